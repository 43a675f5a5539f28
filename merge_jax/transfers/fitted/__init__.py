"""Fitted transfers: every target layer is solved for what the source's layer computes."""

__all__: list[str] = []
