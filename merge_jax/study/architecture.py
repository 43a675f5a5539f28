"""The option that says of what a model of images with text is made."""

from dataclasses import dataclass
from typing import Any

from merge_jax.study.choices import TextModelName, VisionModelName

__all__ = ["Architecture"]


@dataclass(frozen=True)
class Architecture:
    """A model's encoders and what joins them."""

    vision: VisionModelName = "tiny_vit"
    """The encoder of images."""
    text: TextModelName = "small_distilbert"
    """The encoder of text."""
    layers: int | None = None
    """Layers of a small encoder; its own number by default."""
    width: int | None = None
    """Width of a small encoder; its own by default."""
    patch_size: int | None = None
    """Height and width of a small vision encoder's patches; a quarter of the image by default."""
    fusion_layers: int = 2
    """Layers in which the words look at the image, for vqa."""
    dropout: float = 0.0
    """Dropout of both encoders and of those layers."""
    embedding_size: int = 32
    """Size of the vectors that images and captions become, for retrieval."""

    @property
    def vision_attributes(self) -> dict[str, Any]:
        """Attributes of the vision encoder that are not its usual ones."""
        return self._sizes if self.patch_size is None else {**self._sizes, "patch_size": self.patch_size}

    @property
    def text_attributes(self) -> dict[str, Any]:
        """Attributes of the text encoder that are not its usual ones."""
        return self._sizes

    @property
    def _sizes(self) -> dict[str, Any]:
        sizes = {"num_layers": self.layers, "width": self.width}
        return {name: size for name, size in sizes.items() if size is not None}
