"""Data as NumPy arrays in memory, and batches of them as a pure function of the step."""

from merge_jax.data.arrays import Arrays, Splits, batches_of, class_balanced, indices_of, split
from merge_jax.data.augment import crop_flip_rotate
from merge_jax.data.folder import load_image_folder
from merge_jax.data.image_set import ImageSet, channel_statistics, check_images
from merge_jax.data.images import load_digits
from merge_jax.data.tfds_images import load_tfds_images
from merge_jax.data.tfds_text import load_tfds_questions, load_tfds_texts

__all__ = [
    "Arrays",
    "ImageSet",
    "Splits",
    "batches_of",
    "channel_statistics",
    "check_images",
    "class_balanced",
    "crop_flip_rotate",
    "indices_of",
    "load_digits",
    "load_image_folder",
    "load_tfds_images",
    "load_tfds_questions",
    "load_tfds_texts",
    "split",
]
