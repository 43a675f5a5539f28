"""Images with captions or questions, generated or read."""
