"""Files of weights in the formats of other libraries: a file a format, and the table of them."""

__all__: list[str] = []
