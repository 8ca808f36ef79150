"""Fine-tuning for captions, questions and retrieval: recipes, data, models and evaluations."""
