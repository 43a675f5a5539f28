"""Bad input is refused by one line that names it, before anything is compiled and before the run folder is made."""

import gzip
import io
import json
import re
import struct
import tarfile

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from PIL import Image
from safetensors.numpy import save_file

import merge_jax as mj
import merge_jax.study.trainer
from experiments import cross_modal, cross_structure, cross_task
from merge_jax.checkpoints.safetensors import load_params
from merge_jax.data import (
    ImageSet,
    LabelledTexts,
    Streamed,
    TextSet,
    WordPiece,
    batches_of,
    class_balanced,
    indices_of,
    load_coco_captions,
    load_image_folder,
    load_questions,
    load_texts,
    load_vqa,
    split,
)
from merge_jax.data.images.image_files import check_image_files
from merge_jax.data.tfds import archive_members
from merge_jax.study.cli import parse
from merge_jax.study.images import make_vision_encoder
from merge_jax.study.options import Architecture
from merge_jax.study.sources import plan_source
from merge_jax.training.sharding import DATA_AXIS, jit_layout
from merge_jax.transfers.pairing import resolve
from merge_jax.transfers.routes import Route, as_routes
from tests.smoke import run

# What each call is handed: a folder of its own, and what reads the printed lines.


def refused(experiment, *words):
    """The command line of an experiment: exit code 2, one line `error: ...` on standard error, and no run folder."""

    def call(folder, capsys):
        lines = _stopped(experiment, words, folder, capsys).err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert errors == lines[-1:]
        return errors[0].removeprefix("error: ")

    return call


def unparsed(experiment, *words):
    """The same, where the parser of options refuses: it prints a box, with near misses and help."""

    def call(folder, capsys):
        printed = _stopped(experiment, words, folder, capsys)
        return " ".join(re.sub(r"[─│╭╮╰╯]|-{3,}", " ", printed.out + printed.err).split())

    return call


def _stopped(experiment, words, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(experiment, folder / "run", *(str(word).replace("TMP", str(folder)) for word in words))
    assert stopped.value.code == 2
    assert not (folder / "run").exists()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed


def raises(function, kind=ValueError):
    """A function of the library, called with the folder."""

    def call(folder, capsys):
        del capsys
        with pytest.raises(kind) as error:
            function(folder)
        return str(error.value)

    return call


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


# Parameters for routes.


def _block(heads):
    shapes = {"query": (8, heads, 4), "key": (8, heads, 4), "value": (8, heads, 4), "out": (heads, 4, 8)}
    if heads is None:
        shapes = dict.fromkeys(shapes, (8, 8))
    return {name: {"kernel": np.ones(shape, np.float32)} for name, shape in shapes.items()}


TREE = {
    "fc": {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)},
    "scalar": np.float32(1),
    "conv3d": np.ones((2, 2, 2, 3, 4), np.float32),
    "steps": np.ones((3, 3), np.int32),
    "mask": np.ones(3, bool),
    "nothing": np.ones((0, 3), np.float32),
    "attention": _block(2),
    "flat": _block(None),
    "odd": {name: {"kernel": np.ones((2,) * 5, np.float32)} for name in ("query", "key", "value", "out")},
}
KERNEL = {"fc": TREE["fc"]}


def routes(given, **options):
    return raises(lambda _: resolve(as_routes(given), TREE, TREE, **options))


def route(target, source, **options):
    return routes([Route(target, source, **options)])


def lpka(**options):
    return raises(
        lambda _: mj.lpka_transfer({"fc/kernel": "fc/kernel"}, **options).init(jax.random.key(0), KERNEL, KERNEL)
    )


def layers(names):
    return {f"layer_{i}": {name: np.ones((2, 2), np.float32)} for i, name in enumerate(names)}


# Data.


def image_set(images=None, labels=(0, 1, 2, 1), classes=("a", "b", "c")):
    images = np.zeros((4, 2, 2, 3), np.uint8) if images is None else images
    good = {"image": np.zeros((3, 2, 2, 3), np.uint8), "label": np.arange(3) % len(classes)}
    return raises(lambda _: ImageSet("mine", {"image": images, "label": np.array(labels)}, good, tuple(classes)))


def with_pixel(value):
    images = np.zeros((4, 2, 2, 3), np.float32)
    images[2, 0, 1, 2] = value
    return images


def text_set(labels):
    texts = LabelledTexts(("a", "b", "c"), np.array(labels))
    return raises(lambda _: TextSet("mine", texts, LabelledTexts(("a",), np.array([0])), ("no", "yes")))


def png(size=8, mode="RGB"):
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(content, "PNG")
    return content.getvalue()


IMAGES = {f"{part}/{name}/1.png": png() for part in ("train", "test") for name in ("cat", "dog")}


def image_folder(changes, **options):
    """A folder of images with files added, replaced, or left out (None)."""

    def load(folder):
        for name, content in {**IMAGES, **changes}.items():
            if content is not None:
                path = folder / "images" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        load_image_folder(folder / "images", **options)

    return raises(load)


def on_file(name, content, load, kind=ValueError):
    """A function of a file."""

    def call(folder):
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        load(path)

    return raises(call, kind)


def tar_gz(files):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def members(path):
    list(archive_members(path, lambda name: True))


ARCHIVE = tar_gz({"a": bytes(range(256)) * 40})
SMALL = {"label": np.array([0, 1, 2] * 4)}
CSV = "text,label\ngood,1\nbad,0\n"

# Weights.

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def safetensors(header, body=b"\0" * 4):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + body


def weights(header, body=b"\0" * 4):
    return on_file("m.safetensors", safetensors(header, body), mj.load_safetensors)


def loaded(tensors):
    """A file of these tensors, loaded for a model of a dense layer."""

    def load(folder):
        save_file(tensors, folder / "m.safetensors")
        load_params(folder / "m.safetensors", KERNEL)

    return raises(load)


def index(weight_map):
    return on_file(
        "m.safetensors.index.json", json.dumps({"weight_map": weight_map}), mj.load_safetensors, (ValueError, OSError)
    )


FILE = r"TMP/m\.safetensors"
BROKEN = rf"{FILE} is truncated or no safetensors file: .+"

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
    "rate 0": (refused("cross_structure", "--learning-rate", "0"), "learning_rate must be above 0, got 0.0"),
    "momentum 1": (refused("cross_structure", "--momentum", "1"), "momentum must lie in [0, 1), got 1.0"),
    "rate below 0": (refused("cross_task", "--learning-rate", "-0.1"), "learning_rate must be above 0, got -0.1"),
    "rate of the source": (
        refused("cross_task", "--source-learning-rate", "-1"),
        "source_learning_rate must be above 0, got -1.0",
    ),
    "rate of the source nan": (
        refused("cross_task", "--source-learning-rate", "nan"),
        "source_learning_rate must be a finite number, got nan",
    ),
    "rate of the adapter": (
        refused("self_transfer", "--adapter-learning-rate", "0"),
        "adapter_learning_rate must be above 0, got 0.0",
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
        "source_epochs is given without epochs: lengths are in steps or in epochs, not in both",
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
        "shard_state is for jit: pmap keeps a copy of all on every device",
    ),
    # Scale.
    "devices too many": (
        refused("cross_structure", "--devices", "99", "--methods", "vanilla"),
        "the number of devices must lie in [1, 1], got 99",
    ),
    "devices 0": (refused("cross_structure", "--devices", "0"), "devices must be a whole number of at least 1, got 0"),
    "a batch that does not divide": (
        raises(lambda _: jit_layout(AbstractMesh((8,), (DATA_AXIS,))).put_indices({"target": np.zeros((2, 50))})),
        "a batch of 50 (target) does not divide among 8 devices: take a multiple of 8, or fewer devices",
    ),
    "processes without a coordinator": (
        refused("cross_structure", "--num-processes", "2"),
        "several processes need all of coordinator, num_processes and process_id",
    ),
    "a coordinator of one process": (
        refused("cross_structure", "--coordinator", "localhost:8080"),
        "several processes need all of coordinator, num_processes and process_id",
    ),
    "no address": (
        refused("cross_structure", "--coordinator", "here", "--num-processes", "2"),
        "the coordinator's address must be host:port, got 'here'",
    ),
    "processes 0": (
        refused("cross_structure", "--num-processes", "0"),
        "num_processes must be a whole number of at least 1, got 0",
    ),
    "a process that is none": (
        refused("cross_structure", "--process-id", "3"),
        "process_id must lie in [0, 1), got 3",
    ),
    # Routes.
    "route: no pair": (
        refused("cross_structure", "--routes", "fc/kernel"),
        "a route must be target=source, such as fc/kernel=fc/kernel, got 'fc/kernel'",
    ),
    "route: unknown path": (
        routes({"fc/kernal": "fc/kernel"}),
        "unknown target path 'fc/kernal'; did you mean 'fc/kernel' or 'flat/out/kernel' or 'flat/key/kernel'?",
    ),
    "route: unknown source": (
        routes({"fc/kernel": "fc/kernl"}),
        "unknown source path 'fc/kernl'; did you mean 'fc/kernel' or 'flat/out/kernel' or 'flat/key/kernel'?",
    ),
    "route: unknown path in a run": (
        refused("cross_structure", "smoke", "--methods", "share", "--routes", "fc/kernal=fc/kernel"),
        "unknown target path 'fc/kernal'; did you mean 'fc/kernel' or 'stem/kernel' or 'head/kernel'?",
    ),
    "route: a module": (
        routes({"fc": "fc/kernel"}),
        re.compile("unknown target path 'fc'; there is 'attention/key/kernel', .*, 'fc/bias', 'fc/kernel', .*'steps'"),
    ),
    "route: no leaf matches": (
        routes({"x/*": "fc/kernel"}),
        re.compile("the target pattern 'x/\\*' matches no leaf; there is 'attention/key/kernel', .*"),
    ),
    "route: a star inside a part": (
        routes({"*kernel": "fc/kernel"}),
        "the target pattern '*kernel' matches no leaf; '*' stays inside one part of a path, so try '**/*kernel'",
    ),
    "route: part of a path": (
        routes({re.compile("kernel"): "fc/kernel"}),
        "the target pattern 'kernel' matches no leaf; a regular expression has to match whole paths; did you mean"
        " 'fc/kernel' or 'odd/out/kernel' or 'odd/key/kernel'?",
    ),
    "route: a glob that is none": (
        routes({"fc/[z-a]": "fc/kernel"}),
        "the pattern 'fc/[z-a]' cannot be read: bad character range z-a",
    ),
    "route: none": (routes({}), "no routes: give at least one pair of a target and a source path"),
    "route: none in a run": (
        refused("cross_structure", "--routes"),
        "no routes: give at least one pair of a target and a source path",
    ),
    "route: a word": (
        routes(["ab"]),
        "a route is a pair (target path, source path) of strings or patterns, got 'ab'",
    ),
    "route: a route of nothing": (
        route((), "fc/kernel"),
        "a route is a pair (target path, source path) of strings or patterns, got ((), 'fc/kernel')",
    ),
    "route: a route of None": (
        route("fc/kernel", None),
        "a route is a pair (target path, source path) of strings or patterns, got ('fc/kernel', None)",
    ),
    "route: doubled": (
        routes([("fc/kernel", "fc/kernel"), ("fc/kernel", "fc/bias")]),
        "the target path 'fc/kernel' is routed twice, from 'fc/kernel' and from 'fc/bias'",
    ),
    "route: doubled by a pattern": (
        routes([("fc/kernel", "fc/kernel"), ("fc/*", "fc/bias")]),
        "the target path 'fc/kernel' is routed twice, from 'fc/kernel' and from 'fc/bias'",
    ),
    "route: a scalar": (
        routes({"scalar": "fc/kernel"}),
        "the target leaf 'scalar' cannot take part: 'scalar' of shape () is no matrix: it needs a rank of 1 or more and"
        " elements",
    ),
    "route: no elements": (
        routes({"fc/kernel": "nothing"}),
        "the source leaf 'nothing' cannot take part: 'nothing' of shape (0, 3) is no matrix: it needs a rank of 1 or"
        " more"
        " and elements",
    ),
    "route: five axes for attention": (
        route("odd", "attention", view="attention"),
        "the target leaves 'odd/query/kernel + odd/key/kernel + odd/value/kernel + odd/out/kernel' cannot take part:"
        " 'odd/query/kernel' of shape (2, 2, 2, 2, 2) is no kernel of an attention block",
    ),
    "route: five axes beside two": (
        route(("fc/kernel", "conv3d"), "fc/kernel"),
        "the target leaves 'fc/kernel + conv3d' cannot take part: leaves that make one matrix together need the same"
        " inputs"
        " and window, got (4, 3) and (2, 2, 2, 3, 4)",
    ),
    "route: integers": (
        routes({"steps": "fc/kernel"}),
        "the target leaf 'steps' must be a float array, got an array of int32",
    ),
    "route: from flags": (
        routes({"fc/kernel": "mask"}),
        "the source leaf 'mask' must be a float array, got an array of bool",
    ),
    "route: unequal numbers": (
        routes({"fc/*": "attention/*/kernel"}),
        "'fc/*' names 2 leaves of the target (fc/bias, fc/kernel), 'attention/*/kernel' names 4 of the source ("
        "attention/key/kernel, attention/out/kernel, attention/query/kernel, ...); a pairing needs as many, or one of"
        " the"
        " source (match pairs models of different depth)",
    ),
    "route: keys that collide": (
        raises(lambda _: resolve(as_routes({"a/b": "a/b"}), KERNEL, {"a": {"b": np.ones(2)}, "a.b": np.ones(2)})),
        "the paths 'a/b' and 'a.b' of the tree collide; rename one of the keys",
    ),
    # Transfers: rank, heads, depth.
    "rank 0": (lpka(rank=0), "rank must be a whole number of at least 1, got 0"),
    "rank of a route": (
        route("fc/kernel", "fc/kernel", rank=1.5),
        "rank must be a whole number of at least 1, got 1.5",
    ),
    "rank above the matrix": (
        lpka(rank=9),
        "the target leaf 'fc/kernel' is a matrix [3, 4], too small for the rank 9; its route may have a rank of its"
        " own,"
        " or rank='whole'",
    ),
    "heads that do not divide": (
        route("flat", "attention", view="attention", target_heads=3),
        "the target leaves 'flat/query/kernel + flat/key/kernel + flat/value/kernel + flat/out/kernel' cannot take"
        " part: 3"
        " heads do not divide the 8 features of the attention",
    ),
    "heads not told": (
        route("flat", "attention", view="attention"),
        "the target leaves 'flat/query/kernel + flat/key/kernel + flat/value/kernel + flat/out/kernel' cannot take"
        " part:"
        " its kernels have no axis of heads; give target_heads or source_heads",
    ),
    "heads of another number": (
        route("attention", "attention", view="attention", source_heads=4),
        "the source leaves 'attention/query/kernel + attention/key/kernel + attention/value/kernel +"
        " attention/out/kernel'"
        " cannot take part: 4 heads are given, 'attention/query/kernel' of shape (8, 2, 4) has 2",
    ),
    "heads of another type": (
        route("flat", "attention", view="attention", target_heads="2"),
        "target_heads must be a whole number of at least 1, got '2'",
    ),
    "a spec that is none": (
        route("fc/kernel", "fc/kernel", target_spec="rows"),
        "target_spec must be a MatrixSpec, got 'rows'",
    ),
    "depth: another kind": (
        raises(lambda _: mj.match(layers(["up", "down"]), layers(["up", "across"]), source="*/*", target="*/*")),
        "the target has leaves of the kind 'across', the source has none: there is 'up', 'down'. Where kinds have"
        " other names,"
        " match them one at a time; unmatched='skip' leaves them out",
    ),
    "a dropout that is none": (lpka(attention_dropout="0.1"), "attention_dropout must lie in [0, 1), got '0.1'"),
    "an output form": (lpka(output="warn"), "unknown output form 'warn'; did you mean 'warm'?"),
    # Data: files.
    "data: unknown set": (
        refused("cross_structure", "--data", "cifar1000"),
        re.compile(
            r"unknown data set 'cifar1000'; did you mean 'cifar100' or 'cifar10'.* \(a folder is \./cifar1000\)"
        ),
    ),
    "data: no folder": (
        refused("cross_structure", "--data", "TMP/images"),
        "the folder TMP/images/train is missing; images are looked for in TMP/images/train/<class>/",
    ),
    "data: a name that no disk takes": (
        refused("cross_structure", "--data", "TMP/" + "x" * 300),
        re.compile(r"\[Errno 36\] File name too long: 'TMP/x{300}/train'"),
    ),
    "data: no table": (
        refused("cross_task", "--target-data", "TMP/mine.tsv", "--source-task", "sentiment"),
        "TMP/mine.tsv is missing or not a file",
    ),
    "data: no vocabulary": (
        raises(lambda folder: WordPiece.from_vocabulary(folder / "vocab.txt")),
        "the vocabulary TMP/vocab.txt is missing or not a file",
    ),
    "data: no captions": (
        raises(lambda folder: load_coco_captions(folder, image_size=8)),
        "TMP lacks annotations/captions_train2017.json; expected are annotations/captions_train2017.json,"
        " annotations/captions_val2017.json, and in TMP there is nothing",
    ),
    "data: no questions on images": (
        raises(lambda folder: load_vqa(folder / "vqa", image_size=8)),
        "the folder TMP/vqa is missing; expected in it are v2_OpenEnded_mscoco_train2014_questions.json,"
        " v2_mscoco_train2014_annotations.json, v2_OpenEnded_mscoco_val2014_questions.json,"
        " v2_mscoco_val2014_annotations.json",
    ),
    "data: a class without images": (
        image_folder({"train/bird/readme.txt": b"", "test/bird/1.png": png()}),
        "the class folder TMP/images/train/bird has no image; names must end in .bmp, .jpeg, .jpg, .png, .webp",
    ),
    "data: a class without a test": (
        image_folder({"test/dog/1.png": None}),
        "TMP/images must have the same classes in train and test: only in train ['dog'], only in test []",
    ),
    "data: an image of another size": (
        image_folder({"train/dog/1.png": png(9)}),
        "images must be of one size, but TMP/images/train/cat/1.png is 8x8 and TMP/images/train/dog/1.png is 9x9"
        " (width x"
        " height); give image_size to scale them",
    ),
    "data: a cut image": (
        image_folder({"test/cat/1.png": png(64)[:3000]}, image_size=8),
        "the image TMP/images/test/cat/1.png cannot be read: image file is truncated",
    ),
    "data: an empty image": (
        image_folder({"train/cat/1.png": b""}),
        "the image TMP/images/train/cat/1.png cannot be read: cannot identify image file 'TMP/images/train/cat/1.png'",
    ),
    "data: an image size of 0": (
        image_folder({}, image_size=0),
        "image_size must be a whole number of at least 1, got 0",
    ),
    "data: a missing image": (
        raises(lambda folder: check_image_files(folder, ["1.png"])),
        "the image TMP/1.png is missing; there is nothing (1 of 1 images cannot be used; unreadable='skip' leaves such"
        " images"
        " out)",
    ),
    "data: a cut archive": (
        on_file("x.tar.gz", ARCHIVE[:-20], members),
        "the archive TMP/x.tar.gz is truncated or broken (Compressed file ended before the end-of-stream marker was"
        " reached); replace it with a whole one",
    ),
    "data: an archive with a bit turned": (
        on_file("x.tar.gz", ARCHIVE[:-6] + bytes([ARCHIVE[-6] ^ 1]) + ARCHIVE[-5:], members),
        re.compile(
            r"the archive TMP/x\.tar\.gz is truncated or broken \(CRC check failed .*\); replace it with a whole one"
        ),
    ),
    "data: no archive": (
        on_file("x.tar.gz", b"hello", members),
        "the archive TMP/x.tar.gz is truncated or broken (Not a gzipped file (b'he')); replace it with a whole one",
    ),
    "data: no gzip of a tar": (
        on_file("x.tar.gz", gzip.compress(b"hello"), members),
        "the archive TMP/x.tar.gz is truncated or broken (truncated header); replace it with a whole one",
    ),
    "data: a cut table": (
        on_file("x.csv", CSV + "bad\n", load_texts),
        "TMP/x.csv, line 4: 1 columns, expected 2 as in line 1",
    ),
    "data: no UTF-8": (
        on_file("x.csv", b"text,label\n\xff,1\n", load_texts),
        "TMP/x.csv, line 2: not UTF-8, at the byte 0xff",
    ),
    "data: another column": (
        on_file("x.csv", CSV.replace("label", "lable"), load_texts),
        "TMP/x.csv has no column 'label'; did you mean 'lable'? (without a header, columns go by number from 0)",
    ),
    "data: no rows": (on_file("x.csv", "text,label\n", load_texts), "TMP/x.csv has no rows"),
    "data: another suffix": (
        on_file("x.npz", b"PK\3\4", load_texts),
        "TMP/x.npz must end in one of .csv, .jsonl, .tsv",
    ),
    "data: a cut line": (
        on_file("x.jsonl", '{"text": "good", "label": 1}\n{"text": "b', load_texts),
        "TMP/x.jsonl, line 2: no JSON: Unterminated string starting at: line 1 column 10 (char 9)",
    ),
    "data: cut questions": (
        on_file("x.json", '{"data": [', load_questions),
        "TMP/x.json is no JSON: Expecting value: line 1 column 11 (char 10)",
    ),
    # Data: labels and pixels.
    "label -1": (
        image_set(labels=(0, -1, 1, 2)),
        "mine train: labels must lie in [0, 3), got -1 at index 1 (1 of 4 are out of range)",
    ),
    "label C": (
        image_set(labels=(0, 1, 3, 2)),
        "mine train: labels must lie in [0, 3), got 3 at index 2 (1 of 4 are out of range)",
    ),
    "label 1.5": (
        image_set(labels=(0, 1.5, 1, 2)),
        "mine train: labels must be of an integer type, got float64, such as 1.5 at index 1",
    ),
    "labels of other images": (image_set(labels=(0, 1)), "mine train: labels of 4 images must be [4], got shape (2,)"),
    "label -1 of a text": (
        text_set([0, -1, 1]),
        "mine train: labels must lie in [0, 2), got -1 at index 1 (1 of 3 are out of range)",
    ),
    "label C of a text": (
        text_set([0, 1, 2]),
        "mine train: labels must lie in [0, 2), got 2 at index 2 (1 of 3 are out of range)",
    ),
    "label 1.5 of a text": (
        on_file("x.csv", "text,label\na,0\nb,1.5\n", load_texts),
        "TMP/x.csv, line 3: the label '1.5' must be a whole number, as in line 2",
    ),
    "labels that leave one out": (
        on_file("x.csv", "text,label\na,0\nb,2\n", load_texts),
        "TMP/x.csv: the labels 0, 2 leave out some of 3 classes; if that is meant, give classes and first_label",
    ),
    "pixel nan": (
        image_set(with_pixel(np.nan)),
        "mine train: pixels must be finite, got nan at (2, 0, 1, 2) (1 are not finite)",
    ),
    "pixel inf": (
        image_set(with_pixel(-np.inf)),
        "mine train: pixels must be finite, got -inf at (2, 0, 1, 2) (1 are not finite)",
    ),
    "pixels of another type": (
        image_set(np.zeros((4, 2, 2, 3), np.int64)),
        "mine train: images must be uint8 or of a float type, got int64",
    ),
    "pixels without channels": (
        image_set(np.zeros((4, 2, 2), np.uint8)),
        "mine train: images must be [N, H, W, C], got shape (4, 2, 2)",
    ),
    "rows that are not there": (
        raises(lambda _: Streamed(np.zeros((4, 2)), np.array([0, 4]))),
        "rows must lie in [0, 4), the rows of the table, got 0 to 4",
    ),
    # Data: how much there is.
    "no examples": (
        image_set(np.zeros((0, 2, 2, 3), np.uint8), labels=()),
        "mine train: there are no examples, image has shape (0, 2, 2, 3)",
    ),
    "batches of nothing": (
        raises(lambda _: indices_of(0, 4, 0)),
        "batches need examples and a size of at least 1, got 0 and 4",
    ),
    "batches of a half": (
        raises(lambda _: indices_of(10, 1.5, 0)),
        "batches need examples and a size of at least 1, got 10 and 1.5",
    ),
    "entries of unequal lengths": (
        raises(lambda _: batches_of({"a": np.ones(2), "b": np.ones(3)}, 1, 0)),
        "all entries must have the same number of examples, got {'a': 2, 'b': 3}",
    ),
    "fewer rows than a batch": (
        refused("cross_structure", "--labels", "20", "--batch-size", "32"),
        "batch_size is 32, but the target learns from 20 examples: a batch would have some of them twice",
    ),
    "fewer labels than classes": (
        refused("cross_structure", "--labels", "5"),
        "the number of labels must lie between 10, one of each class, and 1197, the number there is, got 5",
    ),
    "more labels than there are": (
        raises(lambda _: class_balanced(SMALL, 13, 0)),
        "the number of labels must lie between 3, one of each class, and 12, the number there is, got 13",
    ),
    "no labels": (
        raises(lambda _: class_balanced({"text": np.ones(3)}, 2, 0)),
        "entry 'label' is missing; there is 'text'",
    ),
    "a split of none": (raises(lambda _: split(SMALL, 0, 0)), "size must be a whole number of at least 1, got 0"),
    "a split of all": (
        raises(lambda _: split(SMALL, 12, 0)),
        "the size of a split of 12 examples with each of 3 labels on either side must lie in [3, 9], got 12",
    ),
    "a label that cannot be split": (
        raises(lambda _: split({"label": np.array([0, 0, 0, 7])}, 2, 0)),
        "a split needs two examples of each label, there is one of 7",
    ),
    "validation of all": (
        refused("cross_task", "--validation", "4000", "--source-task", "sentiment"),
        "validation must lie in [1, 1999], for 2000 training examples of synthetic_reviews, got 4000",
    ),
    "validation below 0": (refused("cross_structure", "--validation", "-1"), "validation must be 0 or more, got -1"),
    "digits of another size": (
        refused("cross_structure", "--image-size", "4"),
        "shifted_digits are 10x10 images: image_size is for other data, got 4",
    ),
    "scenes too small": (
        refused("cross_modal", "--image-size", "15"),
        "image_size must be a whole number of at least 16 pixels, got 15",
    ),
    "scenes of no size": (
        refused("cross_modal", "--image-size", "None"),
        "vqa needs --image-size, which its images are scaled to",
    ),
    # Weight files.
    "weights: none": (
        raises(lambda folder: mj.load_safetensors(folder / "none.safetensors"), FileNotFoundError),
        "there is no file or folder TMP/none.safetensors",
    ),
    "weights: an empty folder": (
        raises(mj.load_safetensors, FileNotFoundError),
        "the folder TMP has neither model.safetensors.index.json nor a .safetensors file",
    ),
    "weights: empty": (on_file("m.safetensors", b"", mj.load_safetensors), re.compile(BROKEN)),
    "weights: a header of 1 TB": (
        on_file("m.safetensors", struct.pack("<Q", 10**12) + b"{}", mj.load_safetensors),
        re.compile(BROKEN),
    ),
    "weights: no JSON": (weights("hello"), re.compile(BROKEN)),
    "weights: cut": (weights({"a": ONE}, b"\0" * 3), re.compile(BROKEN)),
    "weights: trailing bytes": (weights({"a": ONE}, b"\0" * 5), re.compile(BROKEN)),
    "weights: an unknown type": (weights({"a": {**ONE, "dtype": "F99"}}), re.compile(BROKEN)),
    "weights: a size below 0": (weights({"a": {**ONE, "shape": [-1]}}), re.compile(BROKEN)),
    "weights: overlapping": (weights({"a": ONE, "b": ONE}), re.compile(BROKEN)),
    "weights: a size that overflows": (weights({"a": {**ONE, "shape": [2**62, 4]}}), re.compile(BROKEN)),
    "weights: a name twice": (
        weights(f'{{"a": {json.dumps(ONE)}, "a": {json.dumps(ONE)}}}'),
        "TMP/m.safetensors has the name 'a' twice",
    ),
    "weights: no part of a name": (
        weights({"a..b": ONE}),
        "TMP/m.safetensors has the tensor 'a..b', whose name has an empty part",
    ),
    "weights: one inside the other": (
        weights({"a": ONE, "a.b": {**ONE, "data_offsets": [4, 8]}}, b"\0" * 8),
        "TMP/m.safetensors has the tensors 'a' and 'a.b', one inside the other",
    ),
    "weights: 65 axes": (
        weights({"a": {**ONE, "shape": [1] * 65}}),
        re.compile(rf"the tensor 'a' of {FILE} cannot be read: maximum supported dimension for an ndarray is .*"),
    ),
    "weights: another format": (
        on_file("m.npz", b"PK\3\4", mj.load_safetensors),
        "TMP/m.npz is no safetensors file: weights of other formats (.npz, NumPy) are not read, since some run code"
        " when they are; convert it: mj.save_safetensors('new.safetensors', dict(numpy.load('TMP/m.npz')))",
    ),
    "weights: another shape": (
        loaded({"fc.kernel": np.ones((3, 4), np.float32), "fc.bias": np.ones(3, np.float32)}),
        "TMP/m.safetensors does not fit the model: fc/kernel is float32[3, 4], the model's is float32[4, 3]"
        " (15 numbers in the file, 15 in the model)",
    ),
    "weights: another type": (
        loaded({"fc.kernel": np.ones((4, 3), np.float16), "fc.bias": np.ones(3, np.float32)}),
        "TMP/m.safetensors does not fit the model: fc/kernel is float16[4, 3], the model's is float32[4, 3]"
        " (15 numbers in the file, 15 in the model)",
    ),
    "weights: missing and extra": (
        loaded({"fc.kernel": np.ones((4, 3), np.float32), "fc.base": np.ones(3, np.float32)}),
        "TMP/m.safetensors does not fit the model: fc/base is there, but not in the model; fc/bias is missing; did you"
        " mean"
        " 'fc/base'? (15 numbers in the file, 15 in the model)",
    ),
    "weights: a shard that is missing": (index({"a": "1.safetensors"}), "the file TMP/1.safetensors is missing"),
    "weights: a shard without a name": (
        index({"a": 1}),
        "TMP/m.safetensors.index.json is no index of shards: it needs a 'weight_map' of names to files",
    ),
    "weights: none in a folder of theirs": (
        refused("cross_task", "--target-weights", "TMP"),
        "the weights cannot be read: the folder TMP has neither model.safetensors.index.json nor a .safetensors file",
    ),
    # Sources.
    "source: not named": (
        refused("cross_structure", "--source", "frozen"),
        "a frozen source needs --source-from, a .safetensors file or the folder of a run",
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
        " own (--source pretrained or trajectory) for as many seeds",
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


@pytest.fixture
def nothing_compiles(monkeypatch):
    def compiled(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(merge_jax.study.trainer, "compile_epoch", compiled)
    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)


@pytest.mark.parametrize(("call", "message"), ROWS.values(), ids=ROWS)
def test_bad_input_is_refused_in_one_line_that_names_it(call, message, tmp_path, capsys, nothing_compiles):
    line = call(tmp_path, capsys).replace(str(tmp_path), "TMP")
    assert "\n" not in line
    if isinstance(message, str):
        assert line == message
    else:
        assert message.fullmatch(line), line
