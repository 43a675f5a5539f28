"""Plain Flax (Linen) models, independent of the method."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from merge_jax.models.efficientnet import EfficientNetLite, EfficientNetStage, efficientnet_lite
    from merge_jax.models.huggingface import from_huggingface, text_encoder_of, to_huggingface
    from merge_jax.models.image_text import DualEncoder, Embeddings, VisualAnswerer
    from merge_jax.models.initial import initialize
    from merge_jax.models.mobilenet import (
        InvertedResidualStage,
        MobileNetV2,
        mobilenet_v2,
        mobilenet_v2_half,
        mobilenet_v2_imagenet,
        small_mobilenet_v2,
    )
    from merge_jax.models.pytorch import from_pytorch, to_pytorch
    from merge_jax.models.resnet import (
        ResNet,
        ResNetStage,
        resnet18,
        resnet18_imagenet,
        resnet34_imagenet,
        resnet50,
        resnet50_imagenet,
        small_resnet,
    )
    from merge_jax.models.sentence_files import pooler_of
    from merge_jax.models.transformer import (
        SpanExtractor,
        TextClassifier,
        TextEncoder,
        bert_base,
        distilbert_base,
        minilm,
        minilm_half,
        small_bert,
        small_distilbert,
    )
    from merge_jax.models.vit import ImageClassifier, VisionTransformer, small_vit, tiny_vit, vit_base
    from merge_jax.models.vit_files import from_flax, to_flax
    from merge_jax.models.vit_sources import load_vision_transformer, vision_transformer_of

__all__ = [
    "DualEncoder",
    "EfficientNetLite",
    "EfficientNetStage",
    "Embeddings",
    "ImageClassifier",
    "InvertedResidualStage",
    "MobileNetV2",
    "ResNet",
    "ResNetStage",
    "SpanExtractor",
    "TextClassifier",
    "TextEncoder",
    "VisionTransformer",
    "VisualAnswerer",
    "bert_base",
    "distilbert_base",
    "efficientnet_lite",
    "from_flax",
    "from_huggingface",
    "from_pytorch",
    "initialize",
    "load_vision_transformer",
    "minilm",
    "minilm_half",
    "mobilenet_v2",
    "mobilenet_v2_half",
    "mobilenet_v2_imagenet",
    "pooler_of",
    "resnet18",
    "resnet18_imagenet",
    "resnet34_imagenet",
    "resnet50",
    "resnet50_imagenet",
    "small_bert",
    "small_distilbert",
    "small_mobilenet_v2",
    "small_resnet",
    "small_vit",
    "text_encoder_of",
    "tiny_vit",
    "to_flax",
    "to_huggingface",
    "to_pytorch",
    "vision_transformer_of",
    "vit_base",
]
