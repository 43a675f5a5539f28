"""Options and sources that are none are refused by one line."""

import re

import numpy as np
from safetensors.numpy import save_file

from experiments import cross_modal, cross_structure, cross_task
from merge_jax.study.cli import parse
from merge_jax.study.models.images import make_vision_encoder
from merge_jax.study.options import Architecture
from merge_jax.study.sources import plan_source
from tests.bad_input import raises, refusals, refused, unparsed


def checked(module, **options):
    """A config made by hand, which no parser has seen."""
    return raises(lambda _: module.Config(**options).check())


def source_of(make, *words):
    """The source of a run, as far as it can be told without a trace; `make` makes what it is read from."""

    def read(folder):
        make(folder)
        words_there = [str(word).replace("TMP", str(folder)) for word in ("smoke", *words)]
        config = parse(cross_structure.PRESETS, "", "", words_there)
        config.check()
        plan_source(cross_structure.build(config), config).read(0)

    return raises(read)


ROWS = {
    # Options: typos and unknown names.
    "preset": (refused("cross_structure", "smok"), "unknown preset 'smok'; did you mean 'smoke'?"),
    "option": (
        unparsed("cross_structure", "--learing-rate", "0.1"),
        re.compile(
            r"Unrecognized options Unrecognized options: --learing-rate, 0\.1 Perhaps you meant: --learning-rate .*"
        ),
    ),
    "whole number": (
        unparsed("cross_structure", "--steps", "1.5"),
        re.compile(r"Value error Error parsing --steps: invalid literal for int\(\) with base 10: '1\.5' .*"),
    ),
    "choice": (
        unparsed("cross_structure", "--source", "froze"),
        re.compile(
            r"Invalid choice invalid choice 'froze' for argument '--source'\. Expected one of \('pretrained', .*"
        ),
    ),
    "method": (
        refused("cross_structure", "--methods", "mergnet"),
        "unknown method 'mergnet'; did you mean 'mergenet' or 'mergenet_kd' or 'mergenet_rkd'?",
    ),
    "method twice": (refused("cross_structure", "--methods", "kd", "kd"), "the method 'kd' is named twice"),
    "method of another experiment": (
        refused("self_transfer", "--methods", "kd"),
        "unknown method 'kd'; did you mean 'tf_kd'?",
    ),
    "model of another task": (
        refused("cross_task", "--source-model", "small_resnet", "--vocabulary-size", "60"),
        "unknown text model 'small_resnet'; did you mean 'small_bert' or 'small_distilbert'?",
    ),
    "no source task": (
        refused("cross_task", "--source-task"),
        "source_task must name one or more of sentiment, topic, qa, digits, parity, parity_and_size, shapes, cifar100,"
        " cifar100_coarse",
    ),
    # Options: numbers.
    "rate nan": (
        refused("cross_structure", "--learning-rate", "nan"),
        "learning_rate must be a finite number, got nan",
    ),
    "rate inf": (
        refused("cross_structure", "--learning-rate", "inf"),
        "learning_rate must be a finite number, got inf",
    ),
    "rate 0": (
        refused("cross_structure", "--learning-rate", "0"),
        "learning_rate must be a finite number above 0, got 0.0",
    ),
    "momentum 1": (refused("cross_structure", "--momentum", "1"), "momentum must lie in [0, 1), got 1.0"),
    "rate below 0": (
        refused("cross_task", "--learning-rate", "-0.1"),
        "learning_rate must be a finite number above 0, got -0.1",
    ),
    "rate of the source": (
        refused("cross_task", "--source-learning-rate", "-1"),
        "source_learning_rate must be a finite number above 0, got -1.0",
    ),
    "rate of the source nan": (
        refused("cross_task", "--source-learning-rate", "nan"),
        "source_learning_rate must be a finite number, got nan",
    ),
    "rate of the adapter": (
        refused("self_transfer", "--adapter-learning-rate", "0"),
        "adapter_learning_rate must be a finite number above 0, got 0.0",
    ),
    "rate of the adapter inf": (
        refused("self_transfer", "--adapter-learning-rate", "inf"),
        "adapter_learning_rate must be a finite number, got inf",
    ),
    "an unused number nan": (
        refused("cross_structure", "--methods", "vanilla", "--temperature", "nan"),
        "temperature must be a finite number, got nan",
    ),
    "steps 0": (refused("cross_structure", "--steps", "0"), "steps must be at least 1, got 0"),
    "source steps 0": (refused("cross_structure", "--source-steps", "0"), "source_steps must be at least 1, got 0"),
    "seeds below 0": (refused("cross_structure", "--seeds", "-1"), "seeds must be at least 1, got -1"),
    "first seed below 0": (
        refused("cross_structure", "--first-seed", "-1"),
        "first_seed must be a finite number of at least 0, got -1",
    ),
    "epochs 0": (refused("cross_structure", "--epochs", "0"), "epochs must be a whole number of at least 1, got 0"),
    "cycle 0": (refused("cross_structure", "--cycle", "0"), "cycle must be a whole number of at least 1, got 0"),
    "checkpoints 0": (
        refused("cross_structure", "--checkpoint-every", "0"),
        "checkpoint_every must be at least 1, got 0",
    ),
    "stop nan": (refused("cross_structure", "--stop", "nan"), "stop must be a finite number, got nan"),
    "stop above 1": (refused("cross_structure", "--stop", "1.5"), "stop must be a fraction in [0, 1], got 1.5"),
    "an unused dropout": (
        refused("cross_structure", "--methods", "vanilla", "--attention-dropout", "1"),
        "attention_dropout must lie in [0, 1), got 1.0",
    ),
    "unused heads": (
        refused("cross_structure", "--methods", "vanilla", "--num-heads", "0"),
        "num_heads must be a whole number of at least 1, got 0",
    ),
    "patches 0": (
        raises(lambda _: make_vision_encoder("tiny_vit", 32, {"patch_size": 0})),
        "patch_size must be a whole number of at least 1, got 0",
    ),
    "patches that do not fill": (
        raises(lambda _: make_vision_encoder("tiny_vit", 32, {"patch_size": 5})),
        "patches of 5 do not fill images of 32x32",
    ),
    # Options of another type, in a config made by hand.
    "type: words for a number": (checked(cross_structure, steps="many"), "steps must be int, got 'many'"),
    "type: a fraction of a seed": (checked(cross_structure, seeds=1.5), "seeds must be int, got 1.5"),
    "type: a flag for a number": (
        checked(cross_structure, cycle=True),
        "cycle must be a whole number of at least 1, got True",
    ),
    "type: no rate": (checked(cross_task, learning_rate=None), "learning_rate must be float, got None"),
    "type: a string of routes": (
        checked(cross_structure, routes="fc/kernel=fc/kernel"),
        "routes must be tuple[str, ...], got 'fc/kernel=fc/kernel'",
    ),
    "type: a choice": (
        checked(cross_structure, source="froze"),
        "source must be Literal['pretrained', 'live', 'frozen', 'trajectory'], got 'froze'",
    ),
    "type: inside of another": (
        checked(cross_modal, target_model=Architecture(layers=0.5)),
        "target_model.layers must be int | None, got 0.5",
    ),
    "type: nan inside of another": (
        checked(cross_modal, source_model=Architecture(dropout=float("nan"))),
        "source_model.dropout must be a finite number, got nan",
    ),
    # Options that exclude each other.
    "checkpoints between reports": (
        refused("cross_structure", "--checkpoint-every", "30"),
        "checkpoint_every must be a multiple of report_every, got 30 and 20",
    ),
    "epochs and steps": (
        refused("cross_structure", "--source-epochs", "2"),
        "source_epochs is given without epochs: give lengths either in steps or in epochs",
    ),
    "a control of a live source": (
        refused("cross_structure", "--source", "live", "--source-control", "random"),
        "source_control is for a source that is pretrained or frozen; this one is live: leave out random",
    ),
    "another seed of what is read": (
        refused("cross_structure", "--source", "frozen", "--source-from", "TMP", "--source-control", "other_seed"),
        "source_control other_seed trains a source of another seed: leave out --source frozen",
    ),
    "itself and live": (
        refused("cross_modal", "--source-task", "itself", "--source", "live"),
        "a target that is its own source has none that is live: leave out --source",
    ),
    "agreement without layers": (
        refused("cross_structure", "--methods", "agree", "--agree"),
        "a method with agree needs layers: --agree target=source, such as stage1_0=stage1_0",
    ),
    "pmap and parts": (
        refused("cross_structure", "--parallel", "pmap", "--shard-state"),
        "shard_state needs --parallel jit: pmap keeps a full copy on every device",
    ),
    # Sources.
    "source: not named": (
        refused("cross_structure", "--source", "frozen"),
        "a frozen source needs --source-from, a file of weights or the folder of a run",
    ),
    "source: absent": (
        refused("cross_structure", "--source", "frozen", "--source-from", "TMP/none"),
        "the source cannot be read: there is no file or folder TMP/none",
    ),
    "source: named for one that is trained": (
        refused("cross_structure", "--source-from", "TMP"),
        "--source-from is for a source that is frozen or a trajectory; this one is pretrained, and trained here: add"
        " --source frozen",
    ),
    "source: no checkpoints": (
        refused("cross_structure", "--source", "trajectory", "--source-from", "TMP", "--seeds", "2"),
        "TMP has no checkpoints of source-seed0, source-seed1: it must be the folder of a run that trained a source on"
        " its"
        " own (--source pretrained or trajectory) for the same seeds",
    ),
    "source: checkpoints without a step": (
        source_of(
            lambda folder: (folder / "checkpoints" / "source-seed0").mkdir(parents=True),
            *("--source", "frozen", "--source-from", "TMP"),
        ),
        "TMP/checkpoints/source-seed0 has no saved steps",
    ),
    "source: another model": (
        source_of(
            lambda folder: save_file({"fc.kernel": np.ones((4, 3), np.float32)}, folder / "m.safetensors"),
            *("--source", "frozen", "--source-from", "TMP/m.safetensors"),
        ),
        re.compile(
            r"TMP/m\.safetensors does not fit the model: fc/bias is missing; there is 'fc/kernel'; fc/kernel is"
            r" float32\[4, 3\], the model's is float32\[\d+, 10\]; .*"
        ),
    ),
}


test_bad_input_is_refused_in_one_line_that_names_it = refusals(ROWS)
