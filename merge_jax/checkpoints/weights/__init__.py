"""Weight files in other libraries' formats: one module per format, and their table."""

__all__: list[str] = []
