"""Data as NumPy arrays, in memory or streamed; batches are a pure function of the step."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from merge_jax.data.arrays import (
        Arrays,
        Splits,
        batches_of,
        class_balanced,
        fingerprint,
        indices_of,
        num_examples,
        split,
        take,
    )
    from merge_jax.data.image_text.captioned_scenes import scene_captions
    from merge_jax.data.image_text.class_captions import class_captions
    from merge_jax.data.image_text.clevr import load_clevr
    from merge_jax.data.image_text.coco_captions import load_coco_captions
    from merge_jax.data.image_text.image_text_set import CaptionedImages, CaptionSet, VisualQuestions, VisualQuestionSet
    from merge_jax.data.image_text.scene_classes import scene_shapes
    from merge_jax.data.image_text.scene_questions import sort_of_clevr
    from merge_jax.data.image_text.vqa_files import load_vqa
    from merge_jax.data.images.augment import crop_flip_rotate
    from merge_jax.data.images.digits import load_digits, load_shifted_digits
    from merge_jax.data.images.folder import load_image_folder
    from merge_jax.data.images.image_files import ImageFiles
    from merge_jax.data.images.image_set import ImageSet, channel_statistics, check_images
    from merge_jax.data.images.tfds_images import load_tfds_images
    from merge_jax.data.read_ahead import ReadAhead, is_streamed
    from merge_jax.data.streams import Streamed
    from merge_jax.data.text.synthetic_text import synthetic_questions, synthetic_reviews, synthetic_topics
    from merge_jax.data.text.text_files import load_questions, load_text_set, load_texts
    from merge_jax.data.text.text_set import LabelledTexts, Question, QuestionSet, TextSet
    from merge_jax.data.text.tfds_text import load_tfds_questions, load_tfds_texts
    from merge_jax.data.text.tokens import Encoded, EncodedQuestions, WordPiece, decode_spans

__all__ = [
    "Arrays",
    "CaptionSet",
    "CaptionedImages",
    "Encoded",
    "EncodedQuestions",
    "ImageFiles",
    "ImageSet",
    "LabelledTexts",
    "Question",
    "QuestionSet",
    "ReadAhead",
    "Splits",
    "Streamed",
    "TextSet",
    "VisualQuestionSet",
    "VisualQuestions",
    "WordPiece",
    "batches_of",
    "channel_statistics",
    "check_images",
    "class_balanced",
    "class_captions",
    "crop_flip_rotate",
    "decode_spans",
    "fingerprint",
    "indices_of",
    "is_streamed",
    "load_clevr",
    "load_coco_captions",
    "load_digits",
    "load_image_folder",
    "load_questions",
    "load_shifted_digits",
    "load_text_set",
    "load_texts",
    "load_tfds_images",
    "load_tfds_questions",
    "load_tfds_texts",
    "load_vqa",
    "num_examples",
    "scene_captions",
    "scene_shapes",
    "sort_of_clevr",
    "split",
    "synthetic_questions",
    "synthetic_reviews",
    "synthetic_topics",
    "take",
]
