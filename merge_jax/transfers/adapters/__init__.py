"""Learned adapters: networks that make target matrices from the matrices of both models."""

__all__: list[str] = []
