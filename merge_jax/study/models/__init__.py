"""Models of a scenario, with their data and task: images, text or both, from random or pretrained weights."""

__all__: list[str] = []
