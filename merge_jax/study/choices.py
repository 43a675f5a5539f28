"""Names that options choose from. They are separate from their objects: options are parsed before importing JAX."""

from typing import Literal, get_args

__all__ = [
    "OPPONENTS",
    "FileModelName",
    "ImageModelName",
    "ImageTaskName",
    "ImageTextTaskName",
    "LearningRateSchedule",
    "OpponentName",
    "PoolerName",
    "SourceControl",
    "TextModelName",
    "TextTaskName",
    "UpdateRule",
    "VisionModelName",
]

ImageModelName = Literal[
    "small_resnet",
    "small_resnet_half",
    "resnet18",
    "resnet18_quarter",
    "resnet50",
    "small_mobilenet_v2",
    "mobilenet_v2",
    "mobilenet_v2_half",
    "mobilenet_v2_imagenet",
    "mobilenet_v2_imagenet_half",
    "efficientnet_lite0",
    "efficientnet_lite0_half",
    "resnet18_imagenet",
    "resnet18_imagenet_half",
    "resnet34_imagenet",
    "resnet50_imagenet",
    "resnet50_imagenet_half",
]
"""`resnet18_quarter` and the networks with `half` in their names have that part of the channels; the others are
`merge_jax.models`."""

VisionModelName = Literal["small_vit", "tiny_vit", "vit_base"]
"""The vision transformers of `merge_jax.models`."""

FileModelName = Literal["vit_of_file"]
"""`vit_of_file` is the vision transformer whose file `--source-from` names: one of timm, big_vision,
google-research/vision_transformer or Hugging Face."""

TextModelName = Literal["small_bert", "small_distilbert", "minilm", "minilm_half", "bert_base", "distilbert_base"]
"""The encoders of `merge_jax.models`, each with the head of its task."""

PoolerName = Literal["tanh", "relu", "mean", "first"]
"""What is before a classifier of text, those of `merge_jax.models.TextClassifier`."""

ImageTaskName = Literal["digits", "parity", "parity_and_size", "shapes", "cifar100", "cifar100_coarse"]
"""What is learned of images: `parity` (odd or even) and `parity_and_size` (whether at least 5, too) are of the digits
and share no label with them; `shapes` are of rendered scenes; `cifar100_coarse` are the 20 groups of CIFAR-100's 100
classes."""

TextTaskName = Literal["sentiment", "topic", "qa"]
"""Sentiment and topic classify texts; qa finds the answer to a question in a passage, or that there is none."""

ImageTextTaskName = Literal["vqa", "retrieval"]
"""vqa answers questions on images; retrieval finds the caption of an image, and the image of a caption."""

LearningRateSchedule = Literal["cosine", "steps"]
"""To 0 along a cosine, or times 0.2 after 30, 60 and 80 percent of the run, as published."""

SourceControl = Literal["none", "random", "shuffled", "noise", "other_seed"]
"""See `merge_jax.study.sources.control_source`."""

UpdateRule = Literal["exact", "surrogate"]
"""Those of `merge_jax.make_joint_step`."""

OpponentName = Literal["inputs_lr", "source_lr", "source"]
"""What stands in the tables of classifiers beside the methods, and is trained by none."""

OPPONENTS: tuple[OpponentName, ...] = get_args(OpponentName)
