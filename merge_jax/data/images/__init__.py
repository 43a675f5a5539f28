"""Sets of labelled images, and what reads them."""
