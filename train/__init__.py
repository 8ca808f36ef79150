"""Training code: recipes, data, objectives and the drawn world. It imports `blip2`, never the reverse."""
