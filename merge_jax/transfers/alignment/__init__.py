"""Alignment: source channels for the target's, chosen once for all layers that share them."""

__all__: list[str] = []
