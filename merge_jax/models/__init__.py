"""Plain Flax (Linen) models; nothing here knows of the method."""

from merge_jax.models.mobilenet import MobileNetV2, mobilenet_v2, mobilenet_v2_half, small_mobilenet_v2
from merge_jax.models.resnet import ResNet, resnet18, resnet50, small_resnet

__all__ = [
    "MobileNetV2",
    "ResNet",
    "mobilenet_v2",
    "mobilenet_v2_half",
    "resnet18",
    "resnet50",
    "small_mobilenet_v2",
    "small_resnet",
]
