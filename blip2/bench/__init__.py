"""Measure this package against transformers on the same weights: `blip2 bench`.

`folders` writes models with random weights, so that nothing has to be downloaded.
"""
