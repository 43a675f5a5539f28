"""Images with captions or questions, drawn or read."""
