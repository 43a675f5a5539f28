"""Channels of a model, read from its computation: which axes of its leaves share them, and what each layer reads."""

__all__: list[str] = []
