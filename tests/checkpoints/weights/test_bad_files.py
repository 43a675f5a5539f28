"""Broken, foreign and hostile files: one line that names the file, and no file beside it is read."""

import bz2
import gzip
import importlib
import io
import json
import lzma
import pickle
import struct
import sys
import tarfile
import warnings
import zipfile

import flax.serialization
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import save_file

import merge_jax as mj
from merge_jax.commands import main
from tests.checkpoints.weights.writers import FLAT, TREE, WRITERS, keras, keras_model, write_npz

__all__ = ["keras"]

FILES = {
    name: writer
    for name, writer in WRITERS.items()
    if "Orbax" not in name and name not in ("shards", "Checkpoints", "ONNX with numbers beside")
}


def refusal(path, kind=ValueError, **options):
    with pytest.raises(kind) as error:
        mj.load_weights(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_gguf(folder, names=("fc.weight",)):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    for name in names:
        writer.add_tensor(name, np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m.gguf"


@pytest.mark.parametrize("part", [0, 0.02, 0.3, 0.8, 0.999])
@pytest.mark.parametrize("writer", [*FILES.values(), write_gguf], ids=[*FILES, "GGUF"])
def test_a_truncated_file_is_refused_by_its_name(writer, part, tmp_path):
    path = writer(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    assert str(path) in refusal(path)


def test_a_truncated_file_of_keras_is_refused_by_its_name(keras, tmp_path):
    model = keras_model(keras)
    model.save(tmp_path / "m.keras")
    content = bytearray((tmp_path / "m.keras").read_bytes())
    content[len(content) // 2] ^= 1  # Which the checksum of the archive tells.
    (tmp_path / "changed.keras").write_bytes(content)
    assert "changed.keras is truncated or no archive: Bad CRC-32" in refusal(tmp_path / "changed.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    for name in ("m.keras", "m.weights.h5"):
        content = (tmp_path / name).read_bytes()
        for part in (0.02, 0.5, 0.99):
            (tmp_path / name).write_bytes(content[: int(part * len(content))])
            assert str(tmp_path / name) in refusal(tmp_path / name)


def tar_of(content):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("m"), io.BytesIO(content))
    return file.getvalue()


def zip_of(content, name="model.bin"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gzip.compress, "it is compressed with gzip: decompress it first, gzip -dk '"),
        (bz2.compress, "it is compressed with bzip2: decompress it first, bzip2 -dk '"),
        (lzma.compress, "it is compressed with xz: decompress it first, xz -dk '"),
        (tar_of, "it is an archive of tar: unpack it first, tar -xf '"),
        (zip_of, "it is a zip archive of model.bin: unpack it first"),
        (lambda content: zip_of(content, "m/models/model.json"), "it is a program of torch.export: save the tensors"),
        (pickle.dumps, "it is a pickle, and reading one runs code: where you trust it, unpickle it there and save"),
        (lambda content: b"", "it is empty"),
        (
            lambda content: b"<!doctype html><html>",
            "it is a page of the web or XML: what was downloaded is not the file",
        ),
        (lambda content: b"age-encryption.org/v1\n", "it is encrypted with age: decrypt it first, age -d '"),
        (lambda content: b"Salted__" + content, "it is encrypted with OpenSSL: decrypt it first"),
        (lambda content: b' {"error": "not found"}', "it is a text of JSON, such as a configuration: name the file"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "it is the pointer of Git LFS to a file"),
        (lambda content: b"\x1c\0\0\0TFL3\0\0", "it is a model of TensorFlow Lite"),
        (lambda content: b"hello, world", "is not a weight file in a supported format (safetensors, index of shards, "),
    ],
)
def test_what_is_no_weights_is_called_by_its_name(change, message, tmp_path):
    path = WRITERS["safetensors"](tmp_path)
    path.write_bytes(change(path.read_bytes()))
    assert message in refusal(path)


def test_folders_without_weights_are_called_by_their_names(tmp_path):
    assert "is not a weight file in a supported format" in refusal(tmp_path)
    assert "there is no file or folder" in refusal(tmp_path / "none", FileNotFoundError)
    (tmp_path / "weights.bin").touch()
    assert refusal(tmp_path).endswith("ONNX): name one of its files: weights.bin")
    (tmp_path / "__0_0.distcp").touch()
    assert "it is a checkpoint of torch.distributed: make a file of it, python -m torch" in refusal(tmp_path)
    (tmp_path / "saved_model.pb").touch()
    message = refusal(tmp_path)
    assert "it is a SavedModel of TensorFlow" in message
    assert "under names of your own, since several may be called kernel:0" in message
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "it is the folder of a run: name one in its checkpoints" in refusal(tmp_path / "run")
    (tmp_path / "steps" / "10").mkdir(parents=True)
    assert "10 must hold one tree of arrays, found none" in refusal(tmp_path / "steps")


@pytest.mark.parametrize("kind", ["safetensors", "torch", "GGUF"])
def test_a_file_without_tensors_is_refused(kind, tmp_path):
    if kind == "safetensors":
        mj.save_safetensors(tmp_path / "m", {}, metadata={"format": "pt"})
    elif kind == "torch":
        pytest.importorskip("torch").save({}, tmp_path / "m")
    else:
        write_gguf(tmp_path, ()).rename(tmp_path / "m")
    assert "holds no tensors: it was saved without its weights" in refusal(tmp_path / "m")


class Trap:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_pickles_are_refused_by_name(tmp_path):
    np.savez(tmp_path / "m.npz", a=np.array([Trap()], object))
    assert "m.npz has Python objects in 'a', which are pickled, and reading a pickle runs code" in refusal(
        tmp_path / "m.npz"
    )
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"a": Trap()}))
    assert "it is a pickle" in refusal(tmp_path / "m.pkl")
    torch = pytest.importorskip("torch")
    torch.save({"a": Trap()}, tmp_path / "m.pt")
    message = refusal(tmp_path / "m.pt")
    assert "m.pt is not read by torch.load(..., weights_only=True)" in message
    assert message.endswith(
        "load it there, and save the state dict that is in it, torch.save(model.state_dict(), FILE)"
    )


def test_an_encrypted_archive_is_refused(tmp_path):
    path = write_npz(tmp_path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offsets = [member.header_offset + 6 for member in archive.infolist()]
    offsets += [i + 8 for i in range(len(content)) if content[i : i + 4] == b"PK\1\2"]
    for offset in offsets:
        content[offset] |= 1
    path.write_bytes(content)
    assert "m.npz is encrypted ('encoder/layer_0/bias.npy'): decrypt it" in refusal(path).replace("kernel", "bias")


def test_a_name_that_stands_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            with archive.open("a.npy", "w") as member:
                np.lib.format.write_array(member, np.ones(2))
    assert "m.npz has the name 'a.npy' twice" in refusal(tmp_path / "m.npz")
    pair = msgpack.packb("a") + msgpack.packb(1.5)
    (tmp_path / "m.msgpack").write_bytes(b"\x82" + pair + pair)
    assert "m.msgpack has the name 'a' twice" in refusal(tmp_path / "m.msgpack")
    np.savez(tmp_path / "n.npz", **{"a.b": np.ones(1), "a/b": np.ones(1)})
    assert "has the tensors 'a.b' and 'a/b', which are one path" in refusal(tmp_path / "n.npz")
    onnx = pytest.importorskip("onnx")
    tensors = [onnx.numpy_helper.from_array(np.ones(1), "a")] * 2
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors)), tmp_path / "m.onnx")
    assert "m.onnx has the name 'a' twice" in refusal(tmp_path / "m.onnx")


@pytest.mark.parametrize("kind", ["ONNX", "torch"])
def test_names_that_are_no_text_are_refused(kind, tmp_path):
    path = WRITERS[kind](tmp_path)
    broken = path.read_bytes().replace(b"scale", b"s\xff\xfe\xffe").replace(b"/data.pkl", b"/d\xff\xfe\xff.pkl")
    path.write_bytes(broken)
    assert str(path) in refusal(path)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a//b", "..", "./x"])
def test_names_that_lead_out_of_the_tree_are_refused(name, tmp_path):
    np.savez(tmp_path / "m.npz", **{name: np.ones(1)})
    assert "leads out of its tree" in refusal(tmp_path / "m.npz") or "empty part" in refusal(tmp_path / "m.npz")
    (tmp_path / "m.msgpack").write_bytes(flax.serialization.to_bytes({name: np.ones(1)}))
    assert str(tmp_path / "m.msgpack") in refusal(tmp_path / "m.msgpack")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31ma", "a\x7f"])
def test_names_that_change_what_a_terminal_shows_are_refused(name, tmp_path):
    save_file({name: np.ones(1)}, tmp_path / "m.safetensors")
    assert refusal(tmp_path / "m.safetensors").endswith(f"has the tensor {name!r}, whose name has control characters")


def test_what_is_no_number_in_npz_is_left_out_by_select(tmp_path):
    np.savez(tmp_path / "m.npz", a=np.ones(2), version=np.array("1.0"))
    assert "m.npz has <U3 in 'version', which are no numbers: leave it out with select" in refusal(tmp_path / "m.npz")
    assert list(mj.load_weights(tmp_path / "m.npz", "a")) == ["a"]


def header_of(shape, dtype="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_what_claims_more_than_there_is_is_refused(tmp_path):
    for shape in ((2**40,), (2**40, 2**40), (3,)):
        with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
            archive.writestr("a.npy", header_of(shape) + bytes(8))
        assert f"m.npz has {len(header_of(shape)) + 8} bytes for 'a', which claims to be float32" in refusal(
            tmp_path / "m.npz"
        )
    array = msgpack.packb(((2**40,), "float32", bytes(8)), use_bin_type=True)
    (tmp_path / "m.msgpack").write_bytes(msgpack.packb({"a": msgpack.ExtType(1, array)}))
    assert "m.msgpack is truncated or no msgpack of Flax: 8 bytes for float32[1099511627776]" in refusal(
        tmp_path / "m.msgpack"
    )
    (tmp_path / "m.msgpack").write_bytes(b"\xdf\xff\xff\xff\xff\xa1a\xc0")  # Four milliards of entries.
    assert "m.msgpack is truncated or no msgpack of Flax" in refusal(tmp_path / "m.msgpack")
    (tmp_path / "m.msgpack").write_bytes(b"\x81\xa1a" * 5000 + b"\xc0")
    assert str(tmp_path / "m.msgpack") in refusal(tmp_path / "m.msgpack")
    parts = {"__msgpack_chunked_array__": True, "shape": {"0": 2**40}, "chunks": {"0": np.ones(2, np.float32)}}
    (tmp_path / "m.msgpack").write_bytes(flax.serialization.to_bytes({"a": parts}))
    with pytest.raises(ValueError, match=r"m\.msgpack .* parts of 2 numbers for the shape \[1099511627776\]"):
        mj.checkpoints.weight_shapes(tmp_path / "m.msgpack")
    # A member of zeros is as large as it says; one that says more than its stream can hold is not opened.
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("a.npy", header_of((2,)) + bytes(8))
    content = bytearray((tmp_path / "m.npz").read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\1\2") + 24, 2**31)
    (tmp_path / "m.npz").write_bytes(content)
    assert "m.npz claims 2147483648 bytes for 'a.npy', which it cannot hold" in refusal(tmp_path / "m.npz")


def test_a_tensor_of_torch_that_repeats_its_numbers_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(1).expand(2**30), "b": torch.ones(3).expand(2, 3)}, tmp_path / "m.pt")
    assert "m.pt has 'a': a tensor of PyTorch claims to be float32[1073741824] of 4 bytes" in refusal(tmp_path / "m.pt")
    assert mj.load_weights(tmp_path / "m.pt", "b")["b"].shape == (2, 3)


def test_a_shape_of_onnx_that_is_none_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    tensor = onnx.numpy_helper.from_array(np.ones(3), "a")
    tensor.dims[0] = -3
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor])), tmp_path / "m.onnx")
    assert "m.onnx claims the shape [-3] for 'a'" in refusal(tmp_path / "m.onnx")


def test_hdf5_that_claims_more_or_leads_elsewhere_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")

    def written(write):
        with h5py.File(tmp_path / "m.h5", "w") as file:
            write(file.create_group("layers/dense/vars"))
        return refusal(tmp_path / "m.h5")

    (tmp_path / "secret").write_bytes(bytes(64))
    external = [(str(tmp_path / "secret"), 0, 64)]
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "a", (4,))
    assert "claims 4398046511104 bytes for '/layers/dense/vars/0'" in written(
        lambda group: group.create_dataset("0", (2**40,), "f4", chunks=(2**10,))
    )
    for write in (
        lambda group: group.create_dataset("0", (4,), "f4", external=external),
        lambda group: group.create_virtual_dataset("0", layout),
    ):
        assert "stores the values of '/layers/dense/vars/0' in another file" in written(write)
    for link in (h5py.ExternalLink("other.h5", "/a"), h5py.SoftLink("/layers")):
        assert "has the link '0' in '/layers/dense/vars', which may point to another file" in written(
            lambda group, link=link: group.__setitem__("0", link)
        )
    assert "has object in '/layers/dense/vars/0', which is not numeric" in written(
        lambda group: group.__setitem__("0", "text")
    )
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["model_weights"] = h5py.ExternalLink("other.h5", "/a")
    assert "has the link 'model_weights' in '/'" in refusal(tmp_path / "m.h5")
    assert "has the group '/layers/dense/vars/more' at two places" in written(
        lambda group: group.__setitem__("more", group.parent.parent)
    )
    assert "m.h5 has no weights of Keras" in written(lambda group: None)


def test_external_weights_of_onnx_stay_in_its_folder(tmp_path):
    onnx = pytest.importorskip("onnx")
    helpers = importlib.import_module("onnx.external_data_helper")
    for place in ("../secret", "/etc/passwd", "a/../../secret"):
        tensor = onnx.numpy_helper.from_array(np.ones(4, np.float32), "a")
        helpers.set_external_data(tensor, place)
        tensor.ClearField("raw_data")
        graph = onnx.helper.make_graph([], "g", [], [], [tensor])
        (tmp_path / "m.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
        message = refusal(tmp_path / "m.onnx")
        assert "names the file of weights" in message
        assert message.endswith("which is not inside its folder")


@pytest.mark.parametrize(
    ("content", "module", "extra"),
    [
        (b"GGUF\3\0\0\0", "gguf", "gguf"),
        (b"\x08\x0a\x12\x00", "onnx", "onnx"),
        (b"\x89HDF\r\n\x1a\n", "h5py", "keras"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "torch", "torch"),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    content, module, extra, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "m").write_bytes(content)
    assert f"pip install 'merge_jax[{extra}]'" in refusal(tmp_path / "m", ImportError)
    with pytest.raises(SystemExit):
        main(["summary", str(tmp_path / "m")])
    assert f"pip install 'merge_jax[{extra}]'" in capsys.readouterr().err


def test_a_tree_that_does_not_fit_names_ten_differences_and_near_misses(tmp_path):
    path = write_npz(tmp_path)
    like = {**TREE, "encoder": {"layer_0": {"kernal": TREE["encoder"]["layer_0"]["kernel"], "bias": np.ones(3)}}}
    message = refusal(path, like=like)
    assert "encoder/layer_0/kernal is missing; did you mean 'encoder/layer_0/kernel'" in message
    assert "encoder/layer_0/kernel is there, but not in the model" in message
    assert "encoder/layer_0/bias is float16[3], the model's is float64[3]" in message
    message = refusal(path, like={f"w{i}": np.ones(2) for i in range(30)})
    assert message.count(" is missing; ") + message.count(" is there, but") == 10
    assert "and 24 more" in message
    assert "matches no leaf" in refusal(path, select="**/w")
    assert len(FLAT) == 4


def test_what_nnx_would_take_in_silence_does_not_fit_its_model(tmp_path):
    """`nnx.update` takes any shape and any name."""
    params = nnx.to_pure_dict(nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param))
    column = {"kernel": np.ones((3, 1), np.float32), "bias": np.ones(4, np.float32)}
    renamed = {"weight": np.ones((3, 4), np.float32), "bias": np.ones(4, np.float32)}
    for name, tree, message in (
        ("column", column, "kernel is float32[3, 1], the model's is float32[3, 4]"),
        ("renamed", renamed, "weight is there, but not in the model"),
    ):
        mj.save_safetensors(tmp_path / f"{name}.safetensors", tree)
        assert message in refusal(tmp_path / f"{name}.safetensors", like=params)


def test_orbax_that_is_not_whole_is_refused(tmp_path):
    with ocp.CheckpointManager(tmp_path / "m") as manager:
        manager.save(1, args=ocp.args.Composite(a=ocp.args.StandardSave(TREE), b=ocp.args.StandardSave(TREE)))
    assert "must hold one tree of arrays, found a, b: name the folder of one" in refusal(tmp_path / "m")
    assert len(mj.flatten(mj.load_weights(tmp_path / "m" / "1" / "a"))) == 4
    metadata = tmp_path / "m" / "1" / "a" / "_METADATA"
    metadata.write_text(json.dumps({"tree_metadata": {}}))
    assert str(tmp_path / "m" / "1" / "a") in refusal(tmp_path / "m" / "1" / "a")


def test_an_array_of_orbax_that_claims_more_than_there_is_is_refused(tmp_path):
    ocp.PyTreeCheckpointer(use_ocdbt=False).save(tmp_path / "m", {"a": np.ones((2, 3), np.float32)})
    metadata = tmp_path / "m" / "a" / ".zarray"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "shape": [2**40, 3]}))
    assert "m claims 13194139533312 bytes for 'a', which files of " in refusal(tmp_path / "m")


def test_what_orbax_did_not_end_is_no_step(tmp_path):
    with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(step_prefix="ckpt")) as manager:
        for step in (1, 2):
            manager.save(step, args=ocp.args.StandardSave({"a": np.array(step)}))
    unfinished = (tmp_path / "ckpt_2").rename(tmp_path / "ckpt_2.orbax-checkpoint-tmp-7")
    assert mj.load_weights(tmp_path)["a"] == 1
    assert "tmp-7 was not written to its end by Orbax: name another step" in refusal(unfinished)
    tree = tmp_path / "ckpt_1" / "default"
    tree.rename(tree.with_name("default.orbax-checkpoint-tmp"))
    assert "ckpt_1 has no tree of arrays: Orbax did not end writing it" in refusal(tmp_path / "ckpt_1")
