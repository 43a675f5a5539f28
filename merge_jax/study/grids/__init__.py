"""Grids: studies of many runs, executed one by one or on several machines, and their reports."""

__all__: list[str] = []
