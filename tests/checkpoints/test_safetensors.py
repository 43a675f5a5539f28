import json
import os
import re
import stat
import struct

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import merge_jax as mj
from merge_jax.checkpoints.safetensors import tensor_names
from merge_jax.commands import main

TENSORS = {
    "encoder.layer.0.attention.query.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "encoder.layer.0.attention.query.bias": np.ones(3, np.float32),
    "encoder.layer.10.attention.query.weight": np.ones((3, 4), ml_dtypes.bfloat16),
    "embeddings.position_ids": np.arange(5),
    "conv.weight": np.arange(2 * 3 * 5 * 5, dtype=np.float16).reshape(2, 3, 5, 5),
}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.fixture
def sharded(tmp_path):
    """A folder as Hugging Face writes it: two shards and their index."""
    names = list(TENSORS)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for shard, held in shards.items():
        save_file({name: TENSORS[name] for name in held}, tmp_path / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def assert_is_all(tree):
    leaves = mj.flatten(tree)
    assert {path.replace("/", ".") for path in leaves} == set(TENSORS)
    for name, tensor in TENSORS.items():
        leaf = leaves[name.replace(".", "/")]
        assert leaf.dtype == tensor.dtype
        np.testing.assert_array_equal(leaf, tensor)


def test_names_become_paths_and_layouts_stay(file):
    assert_is_all(mj.load_safetensors(file))
    assert_is_all(mj.load_safetensors(file.parent))


def test_shards_are_read_as_one(sharded):
    assert_is_all(mj.load_safetensors(sharded))
    assert_is_all(mj.load_safetensors(sharded / "model.safetensors.index.json"))


def test_only_what_is_selected_is_read(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()  # Not needed, so not missed.
    tree = mj.load_safetensors(sharded, select="**/0/**/weight")
    assert list(mj.flatten(tree)) == ["encoder/layer/0/attention/query/weight"]
    both = ["**/query/bias", "encoder/layer/0/attention/query/weight"]
    assert len(mj.flatten(mj.load_safetensors(sharded, select=both))) == 2


def test_tied_tensors_have_all_their_names(sharded, tmp_path):
    """safetensors' save_model keeps the first name in the alphabet, and the others as strings (0.8.0)."""
    strings = {"format": "pt", "word.weight": "head.weight", "other": "elsewhere"}
    save_file({"head.weight": np.ones((3, 2))}, tmp_path / "tied.safetensors", metadata=strings)
    tree = mj.load_weights(tmp_path / "tied.safetensors", "word/**")
    np.testing.assert_array_equal(tree["word"]["weight"], np.ones((3, 2)))
    assert tuple(tensor_names(tmp_path / "tied.safetensors")) == ("head/weight", "word/weight")
    for name in ("head", "word"):  # A model has both layers or one; a tensor that neither name reads is left over.
        assert mj.load_weights(tmp_path / "tied.safetensors", like={name: {"weight": np.ones((3, 2))}}).keys() == {name}
    with pytest.raises(ValueError, match="head/weight is there, but not in the model"):
        mj.load_weights(tmp_path / "tied.safetensors", like={"last": {"weight": np.ones((3, 2))}})

    path = sharded / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": {"total_size": 1, "a": "conv.weight"}}))
    np.testing.assert_array_equal(mj.load_safetensors(sharded)["a"], TENSORS["conv.weight"])


def test_a_link_to_a_store_is_followed(file, tmp_path):
    """As in the cache of Hugging Face's hub, where a model's files are links out of its folder."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(file)
    assert_is_all(mj.load_safetensors(folder))


def test_torch_layouts_are_understood(file):
    """A torch weight is `[out, in]`: its matrix is itself, and sharing it into a Flax kernel transposes it."""
    source = mj.load_safetensors(file)
    target = {"fc": {"kernel": jnp.zeros((4, 3))}, "conv": {"kernel": jnp.zeros((3, 3, 3, 2))}}
    routes = {"fc/kernel": "encoder/layer/0/attention/query/weight", "conv/kernel": "conv/weight"}
    merged = mj.share_transfer(routes).apply({}, source, target)
    np.testing.assert_array_equal(merged["fc"]["kernel"], TENSORS["encoder.layer.0.attention.query.weight"].T)
    expected = TENSORS["conv.weight"][:, :, 1:4, 1:4].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(merged["conv"]["kernel"], expected)


def test_a_merged_target_goes_back_under_its_names(file, tmp_path):
    target = mj.load_safetensors(file)
    source = {"w": jnp.full((9, 9), 7.0)}
    merged = mj.share_transfer({"encoder/layer/0/attention/query/weight": "w"}).apply({}, source, target)
    path = tmp_path / "new" / "merged.safetensors"
    mj.save_safetensors(path, merged, metadata={"format": "pt"})
    back = load_file(path)
    assert back.keys() == TENSORS.keys()
    np.testing.assert_array_equal(back["encoder.layer.0.attention.query.weight"], 7.0)
    for name in TENSORS.keys() - {"encoder.layer.0.attention.query.weight"}:
        assert back[name].dtype == TENSORS[name].dtype
        np.testing.assert_array_equal(back[name], TENSORS[name])


def interrupt(*paths):
    raise KeyboardInterrupt


def test_nothing_is_half_written(file, tmp_path, monkeypatch):
    before = file.read_bytes()
    with pytest.raises(
        ValueError, match=r"the leaf 'a' must be an array, got str: give its numbers \(numpy\.asarray\), or le"
    ):
        mj.save_safetensors(file, {"a": "text"}, overwrite=True)
    with pytest.raises(ValueError, match=r"metadata are strings by name, got \{'step': 3\}"):
        mj.save_safetensors(file, {"a": np.ones(1)}, metadata={"step": 3}, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            mj.save_safetensors(file, {"a": np.ones(1)}, overwrite=True)
    assert file.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {file.name}
    mj.save_safetensors(file, {"a": np.ones(2)}, overwrite=True)
    assert list(load_file(file)) == ["a"]


class Dropping(nnx.Module):
    def __init__(self, rngs):
        self.fc, self.drop = nnx.Linear(2, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)


@pytest.mark.parametrize(
    ("leaf", "found"),
    [
        (jnp.ones(3, jnp.int4), r"int4\[3\]"),
        (np.ones((2, 1), np.longdouble), r"float128\[2, 1\]"),
        (np.ones(2, np.complex128), r"complex128\[2\]"),
        (np.array(["a"]), r"<U1\[1\]"),
        (np.ones(2, object), r"object\[2\]"),
        (jax.random.key(0), r"key<fry>\[\]"),
    ],
)
def test_what_no_file_can_hold_is_refused_by_its_leaf(leaf, found, tmp_path):
    message = (
        rf"the leaf 'model/x' is {found}, which a safetensors file cannot hold; it holds bool, .*, float8_e8m0fnu\. C"
    )
    with pytest.raises(ValueError, match=message):
        mj.save_safetensors(tmp_path / "new.safetensors", {"model": {"w": np.ones(2), "x": leaf}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (np.ones(2), r"one\.safetensors has the tensor '', whose name has an empty part"),
        ({"a": {"": np.ones(2)}}, r"has the tensor 'a\.', whose name has an empty part"),
        ({"__metadata__": np.ones(2)}, "no leaf of a safetensors file can be named '__metadata__'"),
        ({"a": np.ones(2), "a.b": np.ones(2)}, r"has the tensors 'a' and 'a\.b', one inside the other"),
    ],
)
def test_what_could_not_be_read_back_is_refused(tree, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        mj.save_safetensors(tmp_path / "one.safetensors", tree)
    assert list(tmp_path.iterdir()) == []


def test_keys_with_dots_of_their_own_come_back(tmp_path):
    tree = {"a.b": np.ones(2, np.float32), "c": {"d.e/f": np.zeros(3, np.float32)}}
    mj.save_safetensors(tmp_path / "one.safetensors", tree)
    found = mj.load_params(tmp_path / "one.safetensors", tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, found, tree)


def test_the_random_keys_of_a_module_are_named_with_the_remedy_and_that_is_one(tmp_path):
    module = Dropping(nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"the leaf 'drop/rngs/key' is key<fry>\[\], .* nnx\.state\(module, \(nnx\.Param, nnx"
    ):
        mj.save_safetensors(tmp_path / "new.safetensors", nnx.state(module))
    mj.save_safetensors(tmp_path / "new.safetensors", nnx.state(module, (nnx.Param, nnx.BatchStat)))
    np.testing.assert_array_equal(load_file(tmp_path / "new.safetensors")["fc.kernel"], module.fc.kernel[...])


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_has_the_permissions_that_the_umask_gives(umask, tmp_path):
    old = os.umask(umask)
    try:
        for _ in range(2):
            mj.save_safetensors(tmp_path / "m.safetensors", {"a": np.ones(2)}, overwrite=True)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.msgpack", r"\(\.msgpack\) are not read here: mj\.load_weights\('.*m\.msgpack'\) reads those"),
        ("m.h5", r"\(\.h5\) are not read here: .*, and merge-jax convert .*m\.h5 new\.safetensors makes"),
        ("m.pth", r"\(\.pth\) are not read"),
        ("m.safetensors", "it is the pointer of Git LFS to a file; git lfs pull fetches the file itself"),
    ],
)
def test_a_file_of_another_format_is_called_by_its_name_with_what_to_do(name, message, tmp_path):
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is no safetensors file: .*{message}"):
        mj.load_safetensors(tmp_path / name)


def test_what_is_told_of_a_message_of_flax_makes_a_file_of_it(tmp_path, monkeypatch):
    tree = {"fc": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    (tmp_path / "m.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    with pytest.raises(ValueError, match="and merge-jax ") as caught:
        mj.load_safetensors(tmp_path / "m.msgpack")
    monkeypatch.chdir(tmp_path)
    main(str(caught.value).partition("and merge-jax ")[2].removesuffix(" makes a file of them").split())
    np.testing.assert_array_equal(mj.load_safetensors("new.safetensors")["fc"]["kernel"], tree["fc"]["kernel"])


def test_a_checkpoint_of_orbax_is_called_by_its_name_and_what_is_told_makes_a_file_of_it(tmp_path, monkeypatch):
    tree = {"fc": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "one", tree)
    with mj.Checkpoints(tmp_path / "ours") as checkpoints:
        checkpoints.save(1, tree)
    with pytest.raises(FileNotFoundError, match="it is a checkpoint of Orbax; make a file of it: ") as caught:
        mj.load_safetensors(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    exec(str(caught.value).partition("make a file of it: ")[2], {"mj": mj})
    np.testing.assert_array_equal(mj.load_safetensors("new.safetensors")["fc"]["kernel"], tree["fc"]["kernel"])
    for folder in ("ours", "ours/1"):
        with pytest.raises(
            FileNotFoundError,
            match=rf"it holds checkpoints; if they are of merge_jax, merge-jax export .*{folder} FILE makes",
        ):
            mj.load_safetensors(tmp_path / folder)


def header(text, body=b"\0" * 4):
    return struct.pack("<Q", len(text)) + text.encode() + body


ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file: it is empty"),
        (b"12345", "truncated or no safetensors file"),
        (header(f'{{"a":{ONE}}}', b"\0" * 3), "truncated or no safetensors file"),
        (header(f'{{"a":{ONE}}}', b"\0" * 5), "truncated or no safetensors file"),
        (struct.pack("<Q", 10**12) + b"{}", "truncated or no safetensors file"),
        (header("hello"), "truncated or no safetensors file"),
        (header(f'{{"a":{ONE},"a":{ONE}}}'), "has the name 'a' twice"),
        (header('{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}'), "truncated or no safetensors file"),
        (header('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'), "truncated or no safetensors file"),
    ],
)
def test_broken_files_are_refused(content, message, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        mj.load_safetensors(path)
    assert "broken.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", "a.b"), "the tensors 'a' and 'a.b', one inside the other"),
        (("a.b", "a/b"), "the tensors 'a.b' and 'a/b', which are one path"),
        (("a..b",), "'a..b', whose name has an empty part"),
    ],
)
def test_names_that_make_no_tree_are_refused(names, message, tmp_path):
    save_file({name: np.ones(1, np.float32) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        mj.load_safetensors(tmp_path / "x.safetensors")


def test_shards_and_index_that_disagree_are_refused(sharded):
    edit_index(sharded, lambda weight_map: weight_map.update({"conv.weigth": weight_map["conv.weight"]}))
    with pytest.raises(ValueError, match=r"lacks the tensor 'conv.weigth'; did you mean 'conv.weight'"):
        mj.load_safetensors(sharded)
    edit_index(sharded, lambda weight_map: (weight_map.pop("conv.weigth"), weight_map.pop("conv.weight")))
    with pytest.raises(ValueError, match=r"holds the tensor 'conv.weight', but the index does not name it"):
        mj.load_safetensors(sharded)
    first = "model-00001-of-00002.safetensors"
    save_file({name: TENSORS[name] for name in [*list(TENSORS)[:2], "conv.weight"]}, sharded / first)
    edit_index(sharded, lambda weight_map: weight_map.update({"conv.weight": "model-00002-of-00002.safetensors"}))
    with pytest.raises(ValueError, match=r"'conv.weight', but the index has it in model-00002-of-00002.safetensors"):
        mj.load_safetensors(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002.safetensors is missing"):
        mj.load_safetensors(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '"x"'])
def test_a_file_that_is_no_index_is_refused(text, sharded):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is no"):
        mj.load_safetensors(sharded)


def test_an_index_with_a_name_twice_is_refused(sharded):
    text = '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="has the name 'a' twice"):
        mj.load_safetensors(sharded)


def test_folders_without_or_with_too_many_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*nowhere"):
        mj.load_safetensors(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors\.index\.json nor"):
        mj.load_safetensors(tmp_path)
    for name in ("a", "b"):
        save_file({"w": np.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"several files of weights, name one.*a\.safetensors.*b\.safetensors"):
        mj.load_safetensors(tmp_path)


def test_parts_of_a_distributed_checkpoint_are_refused(tmp_path):
    parts = [tmp_path / f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)]

    def save(part, start):  # As torch.distributed.checkpoint, for which a test would need several processes.
        starts = json.dumps({"w": {"saved_offsets": [start, 0]}})
        save_file({"w": np.ones((3, 2), np.float32)}, part, metadata={"DCP_SHARDING_INFO": starts, "format": "pt"})

    save(parts[0], 0)
    assert mj.load_safetensors(parts[0])["w"].shape == (3, 2)  # The only part is the whole.
    save(parts[1], 3)
    for part in parts:
        with pytest.raises(ValueError, match=r"shard-0000.* is one process's part of .*enable_consolidation=True"):
            mj.load_safetensors(part)


def test_a_selection_that_finds_nothing_names_near_misses(file):
    with pytest.raises(ValueError, match=r"file pattern '\*\*/query/kernel' matches no leaf; .*'conv/weight'"):
        mj.load_safetensors(file, select="**/query/kernel")


def test_the_paths_of_leaves_are_those_that_are_read(tmp_path):
    tree = {"params": {"fc": {"kernel": np.ones((2, 3), np.float32)}}, "batch_stats": {"mean": np.zeros(3, np.float32)}}
    mj.save_safetensors(tmp_path / "m.safetensors", tree)
    assert set(tensor_names(tmp_path / "m.safetensors")) == set(
        mj.flatten(mj.load_safetensors(tmp_path / "m.safetensors"))
    )
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        tensor_names(tmp_path / "n.safetensors")
