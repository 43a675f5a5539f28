"""Mutated configs, routes and files of weights: what is refused is refused by ValueError, what is accepted is right.

What is right is worked out here once more, without the code that is tried. HYPOTHESIS_PROFILE=thousand tries 2000
configs and routes and 5000 files; without it, a tenth of them.
"""

import copy
import json
import math
import re
import struct
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import merge_jax as mj
from experiments import cross_modal, cross_structure, cross_task, self_transfer
from merge_jax.study import parse_routes
from merge_jax.study.cli import parse
from merge_jax.transfers.pairing import resolve
from merge_jax.transfers.routes import Route, as_routes
from merge_jax.transfers.rows import Rows

pytestmark = pytest.mark.slow


def cases(full):
    """As many cases under the profile `thousand`, a tenth of them otherwise."""
    number = full if settings.default.max_examples >= 1000 else full // 10
    unhurried = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=number, suppress_health_check=unhurried)


# Configs.

MODULES = {"cross_modal": cross_modal, "cross_structure": cross_structure, "cross_task": cross_task}
MODULES["self_transfer"] = self_transfer
NAMES = ["pretrained", "live", "frozen", "trajectory", "none", "random", "other_seed", "jit", "pmap", "exact", "warm"]
NAMES += ["learned", "constant", "cosine", "mixed", "small_bert", "digits", "sentiment", "qa", "froze", "", "a=b", "x"]
VALUES = st.one_of(
    st.integers(-2, 4),
    st.sampled_from([15, 30, 150, 10**9, 10**30, -(10**30)]),
    st.floats(),
    st.floats(0, 1),
    st.sampled_from(NAMES),
    st.text(max_size=3),
    st.lists(st.sampled_from([*NAMES, 1]), max_size=2).map(tuple),
    st.sampled_from([None, True, False, b"x", [], {}, Path("x"), np.float32(0.5), np.int64(2), 1j, object]),
)
# Values that may be right, by the type of the preset's.
ALIKE = {
    int: st.integers(-1, 60),
    float: st.floats(-0.5, 1.5) | st.sampled_from([1, 20.0, float("nan"), float("inf")]),
    bool: st.booleans(),
    str: st.sampled_from(NAMES),
    tuple: st.lists(st.sampled_from(NAMES), max_size=2).map(tuple),
}


def assert_right(config):
    """No option excludes another, and what is counted is above 0."""
    assert min(config.seeds, config.steps, config.batch_size, config.cycle, config.report_every) >= 1
    assert config.checkpoint_every % config.report_every == 0
    assert 0 <= config.stop <= 1
    assert 0 < config.learning_rate < math.inf
    assert config.source != "frozen" or config.source_from is not None
    assert config.source_from is None or config.source in ("frozen", "trajectory")
    assert config.source_control == "none" or config.source in ("pretrained", "frozen")
    assert config.source_epochs is None or config.epochs is not None
    assert not (config.shard_state and config.parallel == "pmap")
    assert 0 <= config.process_id < config.num_processes
    assert config.coordinator is None or config.run_dir is not None


def test_the_presets_are_right():
    for module in MODULES.values():
        for config in module.PRESETS.values():
            config.check()
            assert_right(config)


@st.composite
def configs(draw):
    module = MODULES[draw(st.sampled_from(sorted(MODULES)))]
    preset = module.PRESETS[draw(st.sampled_from(sorted(module.PRESETS)))]
    names = draw(
        st.lists(st.sampled_from([field.name for field in fields(preset)]), min_size=1, max_size=3, unique=True)
    )
    values = {name: ALIKE.get(type(getattr(preset, name)), st.integers(0, 60)) for name in names}
    return replace(preset, **{name: draw(st.one_of(alike, alike, VALUES)) for name, alike in values.items()})


@cases(900)
@given(configs())
def test_a_config_is_refused_by_value_error_or_right(config):
    try:
        config.check()
    except ValueError:
        return
    assert_right(config)


@st.composite
def command_lines(draw):
    name = draw(st.sampled_from(sorted(MODULES)))
    options = [field.name.replace("_", "-") for field in fields(MODULES[name].PRESETS["default"])]
    found = [draw(st.sampled_from([*sorted(MODULES[name].PRESETS), "smok", ""]))] if draw(st.booleans()) else []
    for option in draw(st.lists(st.sampled_from(options), max_size=2)):
        if draw(st.integers(0, 9)) == 0:
            option = option[:-1]
        found += [f"--{option}", *draw(st.lists(VALUES.map(str), max_size=2))]
    return name, found


@cases(100)
@given(command_lines())
def test_a_command_line_is_refused_by_value_error_or_the_parser_or_right(capsys, line):
    name, found = line
    try:
        config = parse(MODULES[name].PRESETS, name, "", found)
        config.check()
    except (ValueError, SystemExit):
        return
    finally:
        capsys.readouterr()
    assert_right(config)


# Routes.

SHAPES = [(), (3,), (4, 3), (3, 4), (8, 8), (3, 3, 2, 4), (2, 2, 2, 3, 4), (8, 2, 4), (2, 4, 8), (0, 3), (1, 1)]
DTYPES = ["float32", "float32", "float32", "float16", ml_dtypes.bfloat16, "int32", "bool", "complex64"]
LEAVES = st.builds(np.zeros, st.sampled_from(SHAPES), st.sampled_from(DTYPES))
PARTS = ["fc", "kernel", "bias", "layer_1", "layer_10", "query", "out", "embedding", "weight"]
BLOCK = {name: {"kernel": np.ones((8, 2, 4), np.float32)} for name in ("query", "key", "value")}
BLOCK["out"] = {"kernel": np.ones((2, 4, 8), np.float32)}
TREES = st.recursive(
    LEAVES | st.sampled_from([BLOCK, 1.0, None]),
    lambda inner: st.dictionaries(st.sampled_from(PARTS), inner, min_size=1, max_size=3),
    max_leaves=6,
).map(lambda tree: {"fc": {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)}, "net": tree})


def leaves_of(tree, prefix=()):
    if not isinstance(tree, dict):
        return {} if tree is None else {"/".join(prefix): tree}
    return {path: leaf for key, inner in tree.items() for path, leaf in leaves_of(inner, (*prefix, key)).items()}


@st.composite
def patterns(draw, tree):
    """A path of the tree, changed in one way or none: a letter, a star, a module, several in a tuple; or no path."""
    paths = sorted(leaves_of(tree))
    path = draw(st.sampled_from(paths))
    parts = path.split("/")
    at = draw(st.integers(0, len(path) - 1))
    part = draw(st.integers(0, len(parts) - 1))
    letter = draw(st.sampled_from("ak/.*?[]0_\0"))
    changed = [
        *[path] * 8,
        path[:at] + letter + path[at + 1 :],
        path[:at] + path[at + 1 :],
        "/".join([*parts[:part], draw(st.sampled_from(["*", "**", "?*", "[kb]*", "[z-a]"])), *parts[part + 1 :]]),
        "/".join(parts[:part]),
        "/".join(parts[:-2]),
        re.compile(".*" + re.escape(parts[-1])),
        tuple(draw(st.lists(st.sampled_from(paths), max_size=3))),
        draw(st.sampled_from([None, 3, "", (), ["a"], ("a", 3), b"fc"])),
    ]
    return draw(st.sampled_from(changed))


RIGHT_OPTIONS = {
    "rank": st.sampled_from([None, None, "whole", 1, 2, 3]),
    "view": st.sampled_from([None, None, None, "matrix", "convolution", "attention"]),
    "target_heads": st.sampled_from([None, None, 2]),
    "source_heads": st.sampled_from([None, None, 2]),
    "rows": st.sampled_from([None, None, "first", Rows.by_index([0, -1], 3)]),
    "unmatched": st.sampled_from(["error", "error", "skip"]),
}
WRONG = st.sampled_from([0, -1, -2, 9, 1.5, 2.0, True, "x", "2", float("nan"), (), []])


@st.composite
def options_of_a_route(draw):
    options = {name: draw(right) for name, right in RIGHT_OPTIONS.items()}
    wrong = draw(st.sampled_from([None, *RIGHT_OPTIONS]))
    return options if wrong is None else {**options, wrong: draw(WRONG)}


@st.composite
def specs(draw):
    source, target = draw(TREES), draw(TREES)
    kind = draw(st.sampled_from(["mapping", "pairs", "routes", "routes", "routes", "words", "other"]))
    if kind == "other":
        given = draw(st.sampled_from([{}, [], None, "ab", ["ab"], [("a",)], [(1, 2)], 3, [None]]))
        return source, target, given, None, "matrix"
    sides = [(draw(patterns(target)), draw(patterns(source))) for _ in range(draw(st.integers(1, 2)))]
    if kind == "mapping":
        given = {to: of for to, of in sides if not isinstance(to, list) and not (isinstance(to, tuple) and [] in to)}
    elif kind == "routes":
        given = [Route(to, of, **draw(options_of_a_route())) for to, of in sides]
    else:
        given = sides if kind == "pairs" else [f"{to}={of}" for to, of in sides]
    rank = draw(st.sampled_from([None, None, 1, 2, 3]))
    return source, target, given, rank, draw(st.sampled_from(["matrix", "convolution", "attention"]))


def matches(pattern, path):
    """Whether a glob stands for a path: parts by fnmatch, `**` for any number of parts."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return matches(pattern[1:], path) or (bool(path) and matches(pattern, path[1:]))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and matches(pattern[1:], path[1:])


def named(pattern, leaves):
    """The paths that a pattern stands for."""
    if isinstance(pattern, tuple):
        return [path for one in pattern for path in named(one, leaves)]
    if isinstance(pattern, re.Pattern):
        return [path for path in leaves if pattern.fullmatch(path)]
    return [pattern] if pattern in leaves else [p for p in leaves if matches(pattern.split("/"), p.split("/"))]


def assert_resolved(given, resolved, source, target, view):
    """Every route ends in float leaves that are there, and that the pattern stands for; no target gets two."""
    leaves = {"source": leaves_of(source), "target": leaves_of(target)}
    assert resolved
    targets = [path for route in resolved for path in route.target]
    assert len(set(targets)) == len(targets)
    for route in resolved:
        for role in ("source", "target"):
            paths, one = getattr(route, role), getattr(route, f"{role}_view")
            size = 0
            for path in paths:
                leaf = leaves[role][path]
                assert leaf.dtype in (np.float32, np.float16, ml_dtypes.bfloat16)
                assert leaf.ndim > 0
                size += leaf.size
            assert size > 0
            rows, columns = one.matrix_shape
            # Of a source, only the rows that are paired.
            taken = rows * columns * getattr(one, "heads", 1)
            assert taken < size if getattr(one, "arrangement", None) and role == "source" else taken == size
        assert route.rank is None or 1 <= route.rank <= min(route.target_view.matrix_shape)
    whole = all(route.view is None and route.unmatched == "error" for route in given)
    if whole and view != "attention":
        stood_for = [path for route in given for path in named(route.target, leaves["target"])]
        assert sorted(targets) == sorted(stood_for)


@cases(1000)
@given(specs())
def test_routes_are_refused_by_value_error_or_lead_to_float_leaves(spec):
    source, target, given, rank, view = spec
    try:
        if isinstance(given, list) and all(isinstance(one, str) for one in given) and given != ["ab"]:
            given = parse_routes(given)
        routes = as_routes(given)
        resolved = resolve(routes, source, target, rank=rank, view=view)
    except ValueError:
        return
    assert_resolved(routes, resolved, source, target, view)


# Weights.

ITEMS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U8": "<u1"}
ITEMS |= {"BOOL": "?", "U16": "<u2", "U32": "<u4", "U64": "<u8", "C64": "<c8"}
TENSORS = {
    "encoder.layer.0.query.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "encoder.layer.0.query.bias": {"dtype": "F16", "shape": [2], "data_offsets": [24, 28]},
    "steps": {"dtype": "I64", "shape": [], "data_offsets": [28, 36]},
}
BODY = bytes(range(1, 37))
SIZES = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 24, 28, 36, -1, 2**31, 2**40, 2**62, 2**63, 2**64, 1.5, None, "3", True])
# Copies, since headers change what they have drawn.
ODD = st.sampled_from([None, 3, "x", [], {}, [1], ["a"], {"a": 1}, True, 1e400]).map(copy.deepcopy)


@st.composite
def headers(draw):
    """A header of tensors in which entries are changed, dropped, renamed or doubled."""
    tensors = {name: dict(tensor) for name, tensor in TENSORS.items()}
    for _ in range(draw(st.integers(0, 2))):
        if not tensors:
            break
        name = draw(st.sampled_from(sorted(tensors)))
        change = draw(st.integers(0, 7))
        if change == 0:
            tensors[name]["dtype"] = draw(st.sampled_from([*ITEMS, "BF16", "F8_E4M3", "F4", "F99", "f32", "", 3, None]))
        elif change == 1:
            tensors[name]["shape"] = draw(st.lists(SIZES, max_size=4) | ODD | st.just([1] * 70))
        elif change == 2:
            tensors[name]["data_offsets"] = draw(st.lists(SIZES, min_size=1, max_size=3) | ODD)
        elif change == 3:
            tensors[name].pop(draw(st.sampled_from(["dtype", "shape", "data_offsets"])), None)
        elif change == 4:
            names = [
                "../../x",
                "/etc/x",
                "a..b",
                "",
                ".",
                "..",
                "encoder",
                "encoder.layer",
                "steps",
                "a/b",
                "\0",
                "é",
                "a" * 999,
            ]
            tensors[draw(st.sampled_from([*names, ".".join("a" * 300), "__metadata__"]))] = tensors.pop(name)
        elif change == 5:
            tensors.pop(name)
        elif change == 6:
            tensors["__metadata__"] = draw(
                st.dictionaries(st.text(max_size=3), st.text(max_size=3) | ODD, max_size=2) | ODD
            )
        else:
            tensors[name] = draw(ODD)
        tensors = (
            {name: tensor if isinstance(tensor, dict) else {} for name, tensor in tensors.items()}
            if change < 7
            else tensors
        )
        if change == 7:
            break
    return tensors


@st.composite
def files(draw):
    """The bytes of a file of weights, changed as JSON, as bytes, in its length, or in none of these."""
    header = json.dumps(draw(headers())).encode()
    if draw(st.integers(0, 4)) == 0:
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(header))] * 2)))
        between = draw(
            st.binary(max_size=4) | st.sampled_from([b"{", b"[" * 200, b'"', b"\\ud800", b"1" * 400, b"NaN"])
        )
        header = header[:start] + between + header[min(end, start + 4) :]
    if draw(st.integers(0, 9)) == 0:
        header = header[:-1] + b', "steps": ' + json.dumps(TENSORS["steps"]).encode() + b"}"
    length = len(header) + draw(st.sampled_from([0] * 9 + [1, -1, 8, 10**6, 2**60]))
    content = struct.pack("<Q", max(0, length)) + header + BODY
    if draw(st.integers(0, 4)) == 0:
        content = content[: draw(st.integers(0, len(content)))]
    if draw(st.integers(0, 9)) == 0:
        content += draw(st.binary(max_size=3))
    return content


def assert_read(tree, content):
    """The file says just this: one name a tensor, bytes without gap or overlap, and those bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    pairs = json.loads(content[8 : 8 + length], object_pairs_hook=list)
    body = content[8 + length :]
    tensors = [(name, dict(entries)) for name, entries in pairs if name != "__metadata__"]
    assert len({name for name, _ in pairs}) == len(pairs)
    found = leaves_of(tree)
    assert sorted(found) == sorted(name.replace(".", "/") for name, _ in tensors)
    end = 0
    for name, tensor in sorted(tensors, key=lambda tensor: tensor[1]["data_offsets"]):
        dtype = np.dtype(ml_dtypes.bfloat16 if tensor["dtype"] == "BF16" else ITEMS[tensor["dtype"]])
        start, stop = tensor["data_offsets"]
        assert start == end
        assert stop - start == math.prod(tensor["shape"]) * dtype.itemsize
        leaf = found[name.replace(".", "/")]
        assert leaf.dtype == dtype
        assert list(leaf.shape) == tensor["shape"]
        assert leaf.tobytes() == body[start:stop]
        end = stop
    assert end == len(body)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    return tmp_path_factory.mktemp("weights") / "m.safetensors"


@cases(5000)
@given(files())
def test_weights_are_refused_by_value_error_or_are_what_the_file_says(weights_file, content):
    weights_file.write_bytes(content)
    try:
        tree = mj.load_safetensors(weights_file)
    except ValueError as error:
        if str(weights_file) not in str(error):
            raise AssertionError("the file is not named") from error
        return
    assert_read(tree, content)
