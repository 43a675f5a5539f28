"""Plain Flax (Linen) models; nothing here knows of the method."""

from merge_jax.models.huggingface import from_huggingface, to_huggingface
from merge_jax.models.mobilenet import MobileNetV2, mobilenet_v2, mobilenet_v2_half, small_mobilenet_v2
from merge_jax.models.resnet import ResNet, resnet18, resnet50, small_resnet
from merge_jax.models.transformer import (
    SpanExtractor,
    TextClassifier,
    TextEncoder,
    bert_base,
    distilbert_base,
    small_bert,
    small_distilbert,
)

__all__ = [
    "MobileNetV2",
    "ResNet",
    "SpanExtractor",
    "TextClassifier",
    "TextEncoder",
    "bert_base",
    "distilbert_base",
    "from_huggingface",
    "mobilenet_v2",
    "mobilenet_v2_half",
    "resnet18",
    "resnet50",
    "small_bert",
    "small_distilbert",
    "small_mobilenet_v2",
    "small_resnet",
    "to_huggingface",
]
