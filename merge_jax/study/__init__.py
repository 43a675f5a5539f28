"""The engine of experiments: options, methods, trials, runs, grids and reports.

Your own scenario needs only `from merge_jax import study`. Names are imported on first use, so that `--help` of a
scenario imports no JAX.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from merge_jax.study.choices import (
        FileModelName,
        ImageModelName,
        ImageTaskName,
        ImageTextTaskName,
        LearningRateSchedule,
        PoolerName,
        TextModelName,
        TextTaskName,
        VisionModelName,
    )
    from merge_jax.study.cli import main
    from merge_jax.study.config import RunConfig
    from merge_jax.study.distillation import distillation_objectives, tf_kd_objective
    from merge_jax.study.methods import Objective, choose_methods, make_methods, make_scenario, parse_routes
    from merge_jax.study.models.images import (
        ImageData,
        image_classifier,
        image_model,
        load_image_task,
        load_images,
        make_model,
        named_classifier,
        sgd,
        vision_classifier,
    )
    from merge_jax.study.models.model import SampleImages, StudyModel, classifier
    from merge_jax.study.models.multi_source import side_by_side
    from merge_jax.study.models.tasks import TaskSpec, make_models, routes_by_depth, routes_to_lower_half
    from merge_jax.study.models.texts import TextData, adamw
    from merge_jax.study.models.vit_source import vit_of_file
    from merge_jax.study.options import (
        BY_DEPTH,
        TASKS,
        Architecture,
        ImageTextOptions,
        ModelName,
        TaskName,
        TaskOptions,
        TransferOptions,
        parse_pairs,
    )
    from merge_jax.study.scenario import Method, Scenario, Schedule, StartFn

__all__ = [
    "BY_DEPTH",
    "TASKS",
    "Architecture",
    "FileModelName",
    "ImageData",
    "ImageModelName",
    "ImageTaskName",
    "ImageTextOptions",
    "ImageTextTaskName",
    "LearningRateSchedule",
    "Method",
    "ModelName",
    "Objective",
    "PoolerName",
    "RunConfig",
    "SampleImages",
    "Scenario",
    "Schedule",
    "StartFn",
    "StudyModel",
    "TaskName",
    "TaskOptions",
    "TaskSpec",
    "TextData",
    "TextModelName",
    "TextTaskName",
    "TransferOptions",
    "VisionModelName",
    "adamw",
    "choose_methods",
    "classifier",
    "distillation_objectives",
    "image_classifier",
    "image_model",
    "load_image_task",
    "load_images",
    "main",
    "make_methods",
    "make_model",
    "make_models",
    "make_scenario",
    "named_classifier",
    "parse_pairs",
    "parse_routes",
    "routes_by_depth",
    "routes_to_lower_half",
    "sgd",
    "side_by_side",
    "tf_kd_objective",
    "vision_classifier",
    "vit_of_file",
]
