"""Sets of texts and questions, their loaders and tokens."""
