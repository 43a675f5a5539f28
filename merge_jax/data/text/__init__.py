"""Sets of texts and questions, their tokens, and what reads them."""
