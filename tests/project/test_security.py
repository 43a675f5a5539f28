"""Files of others run no code, lead out of no folder and fill no memory."""

import gzip
import importlib.util
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import jax
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.checkpoints.shards import read_json as read_json_beside_weights
from merge_jax.data import (
    WordPiece,
    load_clevr,
    load_coco_captions,
    load_questions,
    load_texts,
    load_tfds_images,
    load_tfds_texts,
    load_vqa,
    tfds,
)
from merge_jax.data.image_text import clevr
from merge_jax.data.image_text.json_files import files_in, read_json
from merge_jax.data.images.image_files import open_image
from merge_jax.data.tfds import archive_members
from merge_jax.models import from_huggingface
from merge_jax.study.grids.grid import load_experiment
from merge_jax.study.models.image_text import _scale_of_pixels
from merge_jax.study.models.images import load_images
from tests import ROOT
from tests.data import test_clevr

# What runs code of a file.

RUNS_CODE = """
import os, pickle, cloudpickle.sub as p
from joblib import load
from multiprocessing import pickle
import marshal, numpy as np, pandas as pd, shutil, subprocess, tarfile, torch, yaml
np.load(path, allow_pickle=True)
torch.load(path)
eval(text)
exec(text)
yaml.load(text)
yaml.full_load(text)
tar.extractall(folder)
shutil.unpack_archive(path)
subprocess.run(line, shell=True)
os.system(line)
pd.read_pickle(path)
"""
RUNS_NONE = """
import re, subprocess, tarfile, yaml
re.compile(x)
lowered.compile()
tar.extractall(folder, filter="data")
subprocess.run(words, shell=False)
yaml.safe_load(text)
model.eval()
"""


def dangers(*words, source=None):
    """What ruff says of the project's packages, or of a source that were in one, by its rules of security."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "json"]
    words = words or ("--stdin-filename", "merge_jax/x.py", "-")
    done = subprocess.run([*command, *words], cwd=ROOT, input=source, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return {
        (found["filename"], found["location"]["row"], found["message"])
        for found in json.loads(done.stdout)
        if re.match(r"S\d|TID", found["code"])
    }


def test_what_runs_code_is_found_and_what_runs_none_is_not():
    rows = {row for _, row, _ in dangers(source=RUNS_CODE)}
    assert rows == set(range(2, len(RUNS_CODE.splitlines()) + 1))
    assert not dangers(source=RUNS_NONE)


def test_no_source_runs_code_of_a_file():
    assert not dangers("merge_jax", "experiments", "benchmarks", "docs", "notebooks")


class Trap:
    """What makes a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def pickled_objects(save, trap):
    content = io.BytesIO()
    save(content, a=np.array([trap], object)) if save is np.savez else save(content, np.array([trap], object))
    return content.getvalue()


def as_torch_saves(trap):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(trap))
    return content.getvalue()


PICKLES = {
    ".npy": lambda trap: pickled_objects(np.save, trap),
    ".npz": lambda trap: pickled_objects(np.savez, trap),
    ".pkl": pickle.dumps,
    ".pt": as_torch_saves,
    ".bin": as_torch_saves,
    ".ckpt": pickle.dumps,
}


@pytest.fixture
def trap(tmp_path):
    trap = Trap(tmp_path / "sprung")
    yield trap
    assert not trap.folder.exists()


def test_the_trap_works(tmp_path):
    pickle.loads(PICKLES[".pkl"](Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("suffix", PICKLES)
def test_pickled_weights_are_refused_by_name(suffix, trap, tmp_path):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(PICKLES[suffix](trap))
    like = {"w": np.ones(1, np.float32)}
    message = f"model{suffix} is no safetensors file: weights of other formats"
    with pytest.raises(ValueError, match=message):
        mj.load_safetensors(file)
    refusal = (
        f"model{suffix} (has Python objects in|is not read by torch|is not a weight file .*: it is (a pickle|an array))"
    )
    if suffix not in (".pt", ".bin") or importlib.util.find_spec("torch"):
        with pytest.raises(ValueError, match=refusal):
            mj.load_weights(file, like=like)
    with pytest.raises((ValueError, ImportError), match=rf"{refusal}|read by PyTorch, which is not installed"):
        from_huggingface(
            file, {"layer_0": {"attention": {"query": {"kernel": np.ones((4, 2, 2), np.float32)}}}, **_ENCODER}
        )
    # Under another name its content is none of weights; beside others it is not looked at.
    other = tmp_path / "model.safetensors"
    other.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"no safetensors file: (it is (a pick|an a)|.*\(a zip archive\) are not)"):
        mj.load_safetensors(other)
    other.unlink()
    with pytest.raises(FileNotFoundError, match="has neither"):
        mj.load_safetensors(tmp_path)


_ENCODER = {"embeddings": {"word": {"embedding": np.ones((3, 4), np.float32)}}}


@pytest.mark.parametrize("suffix", PICKLES)
def test_pickled_data_are_refused(suffix, trap, tmp_path):
    content = PICKLES[suffix](trap)
    for name in ("data" + suffix, "data.csv", "data.jsonl", "data.json"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="must end in one of"):
        load_texts(tmp_path / f"data{suffix}")
    for name in ("data.csv", "data.jsonl"):
        with pytest.raises(ValueError, match=name):
            load_texts(tmp_path / name)
    with pytest.raises(ValueError, match=r"data\.json"):
        load_questions(tmp_path / "data.json")
    with pytest.raises(ValueError, match="data"):
        WordPiece.from_vocabulary(tmp_path / f"data{suffix}")
    with pytest.raises(ValueError, match="cannot be read: cannot identify image file"):
        open_image(tmp_path / f"data{suffix}")


@pytest.mark.parametrize("name", ["os", "os.path", "../evil", "cli", "cli.main", ""])
def test_a_grid_names_experiments_and_no_other_module(name):
    with pytest.raises(ValueError, match=r"unknown experiment|is not an experiment"):
        load_experiment(name)


# What leads out of a folder.


@pytest.fixture
def folder(tmp_path):
    """A folder with a secret beside it, to which links lead."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "1.png").write_bytes(png(4, 4))
    inside = tmp_path / "folder"
    inside.mkdir()
    (inside / "link.png").symlink_to(tmp_path / "secret" / "1.png")
    (inside / "linked").symlink_to(tmp_path / "secret")
    (inside / "here.png").write_bytes(png(4, 4))
    return inside


def png(width, height, rows=None):
    """A PNG that claims a size, with as many rows as there are."""
    data = b"".join(b"\0" + bytes(3 * width) for _ in range(height if rows is None else rows))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(data))]
    parts = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in [*chunks, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


OUTSIDE = ["../secret/1.png", "a/../../secret/1.png", "/etc/passwd", "..", ".", "", "a\0.png", "a\n.png"]
LINKS = ["link.png", "linked/1.png"]


@pytest.mark.parametrize("name", [*OUTSIDE, *LINKS])
def test_annotations_stay_inside(name, folder):
    (folder / "annotations").mkdir()
    images = [{"id": 1, "file_name": name}]
    captions = [{"id": 1, "image_id": 1, "caption": "a cat"}]
    for split in ("train2017", "val2017"):
        content = json.dumps({"images": images, "annotations": captions})
        (folder / "annotations" / f"captions_{split}.json").write_text(content)
        (folder / split).mkdir()
        for link in ("link.png", "linked"):
            (folder / split / link).symlink_to(folder / link)
    with pytest.raises(ValueError, match=r"which stays inside|outside of"):
        load_coco_captions(folder, image_size=4)


def test_splits_stay_inside(folder):
    for name in ("../secret", "linked"):
        with pytest.raises(ValueError, match=r"lacks|outside of"):
            load_vqa(folder, image_size=4, split_names=("train2014", name))
    with pytest.raises(ValueError, match=r"outside of"):
        files_in(folder, ["link.png"])


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a\0b", "..", "cifar10/../../x", "cifar10:../..", "C:\\x", "imdb_reviews/.."]
)
def test_names_of_sets_are_no_paths(name, tmp_path):
    data_dir = tmp_path / "data"
    for load in (load_tfds_images, load_tfds_texts):
        with pytest.raises(ValueError, match="unknown data set"):
            load(name, data_dir)
    assert not list(tmp_path.iterdir())


def test_folders_without_a_name_that_the_disk_takes_are_named(tmp_path):
    for load in (lambda: load_tfds_images("cifar10", "a\0b"), lambda: load_clevr("a\0b", image_size=4)):
        with pytest.raises(ValueError, match=r"the folder 'a\\x00b' is invalid: a path has no NUL in it"):
            load()
    with pytest.raises(ValueError, match=r"the folder './a\\x00b' cannot be opened"):
        load_images("./a\0b", None, None, 0)


def tar_gz(path, infos, extra=b""):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for info, data in infos:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    path.write_bytes(gzip.compress(extra + content.getvalue()))


def test_members_of_archives_write_nothing_and_links_are_empty(folder):
    archive = folder.parent / "x.tar.gz"
    infos = [(tarfile.TarInfo(name), b"evil") for name in ("../evil", f"{folder.parent}/evil", "a/../../evil", "fine")]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        link = tarfile.TarInfo("link")
        link.type, link.linkname = kind, "/etc/passwd"
        infos.append((link, b""))
    tar_gz(archive, infos)
    before = sorted(folder.parent.rglob("*"))
    found = list(archive_members(archive, lambda name: True))
    assert [content for _, content in found] == [b"evil"] * 4 + [None] * 4
    assert sorted(folder.parent.rglob("*")) == before


def test_members_of_zips_write_nothing(tmp_path):
    files = test_clevr.members()
    files["images/train/../../../../evil.png"] = files["images/train/CLEVR_train_000000.png"]
    test_clevr.put_archive(tmp_path / "data", files)
    before = {path for path in tmp_path.parent.rglob("*") if not path.is_relative_to(tmp_path / "data")}
    load_clevr(tmp_path / "data", image_size=8)
    assert {path for path in tmp_path.parent.rglob("*") if not path.is_relative_to(tmp_path / "data")} == before
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("shard", ["../1.safetensors", "/etc/passwd", "a/../../x", "C:\\x", "..\\x", "", ".", ".."])
def test_shards_stay_inside(shard, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match=r"names the shard .*, which is not inside its folder"):
        mj.load_safetensors(tmp_path)


@pytest.mark.parametrize("part", ["../other", "../../x", "/etc/passwd", "a\0b", "params/..", ".", ""])
def test_parts_of_checkpoints_are_no_paths(part, saved):
    before = sorted(saved.parent.rglob("*"))
    with Checkpoints(saved, read_only=True) as checkpoints, pytest.raises(ValueError, match="is not saved"):
        checkpoints.restore_parts(1, {part: {"w": np.ones(2, np.float32)}})
    assert sorted(saved.parent.rglob("*")) == before


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"params": {"w": jax.numpy.ones(2)}})
    return folder


# What fills the memory.


@pytest.mark.parametrize("shape", [[2**40], [2**40, 2**40], [2**62, 4], [10**6, 10**6, 10**6]])
def test_tensors_are_no_larger_than_their_file(shape, tmp_path):
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    for offsets in ([0, 4], [0, 2**42], [0, min(4 * int(np.prod(shape, dtype=object)), 2**64 - 1)]):
        header["a"]["data_offsets"] = offsets
        text = json.dumps(header).encode()
        (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        with pytest.raises(ValueError, match="truncated or no safetensors file"):
            mj.load_safetensors(tmp_path / "m.safetensors")


def test_a_member_that_claims_more_than_the_limit_is_not_read(tmp_path):
    info = tarfile.TarInfo("aclImdb/train/pos/1.txt")
    info.size = 2**40
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT)))
    with pytest.raises(
        ValueError, match=r"x\.tar\.gz unpacks to 1099511627776 bytes \(aclImdb/train/pos/1\.txt\), over"
    ):
        list(archive_members(tmp_path / "x.tar.gz", lambda name: True))


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_what_an_archive_unpacks_to_is_bounded(kind, tmp_path, monkeypatch):
    """Headers are read too: one of a kind that holds a long name may be a bomb."""
    monkeypatch.setattr(tfds, "_LARGEST", 2**20)
    info = tarfile.TarInfo("bomb")
    info.type, info.size = kind, 2**23
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(2**23)))
    with pytest.raises(ValueError, match=r"x\.tar\.gz unpacks to \d+ bytes .*, over the limit of 1048576"):
        list(archive_members(tmp_path / "x.tar.gz", lambda name: True))


def test_a_bomb_of_many_members_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "_LARGEST", 2**20)
    tar_gz(tmp_path / "x.tar.gz", [(tarfile.TarInfo(str(i)), bytes(2**17)) for i in range(20)])
    with pytest.raises(ValueError, match=r"over the limit of 1048576"):
        list(archive_members(tmp_path / "x.tar.gz", lambda name: True))


@pytest.mark.parametrize(("limit", "member"), [("_LARGEST_JSON", "questions/"), ("_LARGEST_IMAGE", "images/")])
def test_a_member_of_a_zip_is_bounded(limit, member, tmp_path, monkeypatch):
    monkeypatch.setattr(clevr, limit, 20)
    test_clevr.put_archive(tmp_path)
    with pytest.raises(ValueError, match=rf"CLEVR_v1\.0\.zip unpacks to \d+ bytes \(CLEVR_v1\.0/{member}.*\), over"):
        load_clevr(tmp_path, image_size=8)


DEEP = {"lists": "[" * 100_000, "objects": '{"a":' * 100_000, "digits": "1" * 10_000}


@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP)
def test_deep_json_is_refused_by_name(content, tmp_path):
    for name in ("x.json", "x.jsonl", "config.json", "preprocessor_config.json", "m.safetensors.index.json"):
        (tmp_path / name).write_text(content)
    text = content.encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    readers = {
        "x.json": [load_questions, read_json, WordPiece.from_vocabulary],
        "x.jsonl": [load_texts],
        "config.json": [read_json_beside_weights],
        "preprocessor_config.json": [lambda path: _scale_of_pixels(None, path.parent)],
        "m.safetensors.index.json": [mj.load_safetensors],
        "model.safetensors": [mj.load_safetensors],
    }
    for name, read in ((name, read) for name, functions in readers.items() for read in functions):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read(tmp_path / name)


def test_a_name_of_a_thousand_parts_is_refused(tmp_path):
    text = json.dumps({".".join("a" * 1000): {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(ValueError, match="has a tensor whose name has 1000 parts, over the limit of 100"):
        mj.load_safetensors(tmp_path / "m.safetensors")
