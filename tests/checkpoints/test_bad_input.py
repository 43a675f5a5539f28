"""Files of weights that are broken or of another model are refused by one line."""

import json
import re
import struct

import numpy as np
from safetensors.numpy import save_file

import merge_jax as mj
from merge_jax.checkpoints import load_params
from tests.bad_input import KERNEL, on_file, raises, refusals, refused

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
    "weights: none": (
        raises(lambda folder: mj.load_safetensors(folder / "none.safetensors"), FileNotFoundError),
        "there is no file or folder TMP/none.safetensors",
    ),
    "weights: an empty folder": (
        raises(mj.load_safetensors, FileNotFoundError),
        "the folder TMP has neither model.safetensors.index.json nor a .safetensors file",
    ),
    "weights: empty": (
        on_file("m.safetensors", b"", mj.load_safetensors),
        "TMP/m.safetensors is no safetensors file: it is empty",
    ),
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
        "TMP/m.npz is no safetensors file: weights of other formats (.npz) are not read here:"
        " mj.load_weights('TMP/m.npz') reads those that it knows, and merge-jax convert TMP/m.npz new.safetensors makes"
        " a file of them",
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
        re.compile(r"TMP is not a weight file in a supported format \(safetensors, .*\)"),
    ),
}


test_bad_input_is_refused_in_one_line_that_names_it = refusals(ROWS)
