"""Weights in several files, as the libraries write them, and what of them does not fit together."""

import json
import shutil

import flax.serialization
import jax
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.checkpoints.weights.load import find_format
from tests.checkpoints.weights.test_formats import assert_leaves
from tests.checkpoints.weights.writers import FLAT, keras, keras_leaves

__all__ = ["keras"]


def write_torch_shards(folder):
    torch = pytest.importorskip("torch")
    index = {}
    for i, (path, leaf) in enumerate(FLAT.items()):
        index[path.replace("/", ".")] = f"pytorch_model-0000{i + 1}-of-00004.bin"
        torch.save({path.replace("/", "."): torch.from_numpy(leaf)}, folder / index[path.replace("/", ".")])
    return write_index(folder / "pytorch_model.bin.index.json", index)


def write_flax_shards(folder):
    index = {path: f"flax_model-0000{i + 1}-of-00004.msgpack" for i, path in enumerate(FLAT)}
    for path, shard in index.items():
        (folder / shard).write_bytes(flax.serialization.to_bytes(mj.load_weights(_npz_of(folder, path))))
        (folder / "m.npz").unlink()
    return write_index(folder / "flax_model.msgpack.index.json", index)


def _npz_of(folder, path):
    np.savez(folder / "m.npz", **{path: FLAT[path]})
    return folder / "m.npz"


def write_index(file, weight_map, total=64):
    file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return file


@pytest.mark.parametrize("writer", [write_torch_shards, write_flax_shards])
def test_an_index_or_its_folder_is_read_and_only_shards_that_are_wanted(writer, tmp_path):
    file = writer(tmp_path)
    for path in (file, tmp_path):
        assert find_format(path).name == "index of shards"
        assert_leaves(mj.flatten(mj.load_weights(path)), FLAT)
    one = json.loads(file.read_text())["weight_map"]
    for name, shard in one.items():
        if name != "scale":
            (tmp_path / shard).unlink()
    assert_leaves(mj.load_weights(file, "scale"), {"scale": FLAT["scale"]})
    assert mj.checkpoints.weight_shapes(file, "scale")["scale"].shape == ()
    with pytest.raises(FileNotFoundError, match=r"of-00004\.\w+ is missing, which .*index\.json names"):
        mj.load_weights(file)


def test_shards_that_do_not_hold_what_the_index_says_are_refused(tmp_path):
    file = write_flax_shards(tmp_path)
    index = json.loads(file.read_text())["weight_map"]

    def refusal(weight_map):
        write_index(file, weight_map)
        with pytest.raises(ValueError, match=r".") as error:
            mj.load_weights(file)
        return str(error.value)

    assert "lacks the tensor 'scales'; did you mean 'scale'" in refusal({"scales": index["scale"]})
    np.savez(tmp_path / "m.npz", is_on=FLAT["is_on"], scale=FLAT["scale"])
    both = flax.serialization.to_bytes(mj.load_weights(tmp_path / "m.npz"))
    (tmp_path / "both.msgpack").write_bytes(both)
    where = f"the index has it in {index['scale']}"
    assert f"'scale', but {where}" in refusal({**index, "is_on": "both.msgpack"})
    assert "holds the tensor 'scale', but the index does not name it" in refusal({"is_on": "both.msgpack"})
    for place in ("../x.msgpack", "/x.msgpack", "a/../../x.msgpack"):
        assert "which is not inside its folder" in refusal({**index, "scale": place})
    assert "must name one shard for 'scale', found 2" in refusal({**index, "scale": [index["scale"], "x.msgpack"]})
    assert "is no index of shards: it needs a 'weight_map'" in refusal({"scale": 3})
    (tmp_path / "x.msgpack").write_bytes(b"hello")
    assert "is truncated or of neither PyTorch nor Flax msgpack" in refusal({"scale": "x.msgpack"})
    shutil.copy(file, tmp_path / "pytorch_model.bin.index.json")
    with pytest.raises(ValueError, match="has several files of weights, name one: flax_model"):
        mj.load_weights(tmp_path)


def test_a_folder_with_one_file_of_torch_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"fc.weight": torch.ones(2, 3)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    assert mj.load_weights(tmp_path)["fc"]["weight"].shape == (2, 3)
    index = write_index(tmp_path / "m.index.json", {"fc.weight": "pytorch_model.bin"})
    with pytest.raises(ValueError, match=r"index\.json is an index of shards: mj\.load_weights reads them"):
        mj.checkpoints.load_torch(index)


def test_shards_of_keras_are_one_model(keras, tmp_path):
    with jax.numpy_rank_promotion("allow"):
        layers = keras.layers
        both = layers.Bidirectional(layers.GRU(4), name="both")
        model = keras.Sequential([keras.Input((5, 4)), both, layers.Dense(40, name="last")])
    file, shard = tmp_path / "model.weights.json", tmp_path / "model_00002.weights.h5"
    model.save_weights(file, max_shard_size=1300 / 2**30)  # Splits the variables of a layer, too.
    names, total = json.loads(file.read_text())["weight_map"], 4 * model.count_params()
    assert names["/layers/dense/vars"] == ["model_00001.weights.h5", shard.name]
    for path in (file, tmp_path):
        assert_leaves(mj.flatten(mj.load_weights(path)), keras_leaves(model))
    for change, message in (
        ({"/layers/conv/vars": [shard.name]}, "lacks the tensor '/layers/conv/vars'; did you mean"),
        ({"/x": ["../x.weights.h5"]}, "which is not inside its folder"),
        ({"/layers/dense/vars": [shard.name]}, "has the variables 1 of /layers/dense/vars, and lacks those"),
    ):
        write_index(file, {**names, **change})
        with pytest.raises(ValueError, match=message):
            mj.load_weights(file)
    # A bias may be left out of a layer, but not of the sum.
    write_index(file, {**names, "/layers/dense/vars": ["model_00001.weights.h5"]}, total)
    with pytest.raises(
        ValueError, match=rf"of {total} bytes of weights, the shards that it names hold {total - 160}: one"
    ):
        mj.load_weights(file)
    write_index(file, names)
    content = shard.read_bytes()
    shutil.copy(tmp_path / "model_00001.weights.h5", shard)
    with pytest.raises(ValueError, match=r"holds the tensor|both have '/layers/dense/vars/0'"):
        mj.load_weights(file)
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model_00002\.weights\.h5 is truncated"):
        mj.load_weights(file)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"model_00002\.weights\.h5 is missing, which .*weights\.json names"):
        mj.load_weights(file)


def write_gguf_parts(folder, layers=range(5)):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=2)
    for i in layers:
        writer.add_tensor(f"blk.{i}.weight", np.full((2, 32), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [folder / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def test_parts_of_gguf_are_one_model(tmp_path):
    parts = write_gguf_parts(tmp_path)
    expected = {f"blk/{i}/weight": np.full((2, 32), i, np.float32) for i in range(5)}
    for path in (*parts, tmp_path):
        assert_leaves(mj.flatten(mj.load_weights(path)), expected)
    other = shutil.copy(parts[0], tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"several files of weights, name one: m-00001-of-00003\.gguf, other\.gguf"):
        mj.load_weights(tmp_path)
    with pytest.raises(
        ValueError, match=r"other\.gguf is one of 3 parts of a model, but its name does not say which: rename the parts"
    ):
        mj.load_weights(other)
    shutil.copy(parts[0], parts[1])
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf says that it is part 0 \(from 0\) of 3, expected 1"):
        mj.load_weights(parts[0])
    (tmp_path / "larger").mkdir()
    larger = write_gguf_parts(tmp_path / "larger", range(10, 16))
    for part in (0, 1):
        first = write_gguf_parts(tmp_path)[0]
        shutil.copy(larger[part], parts[part])
        with pytest.raises(
            ValueError, match=rf"0000{part + 1}-of-00003.gguf is of 6 tensors in 3 parts, but those beside"
        ):
            mj.load_weights(first)
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"m-00002-of-00003\.gguf is missing, one of the 3 parts of"):
        mj.load_weights(parts[2])
