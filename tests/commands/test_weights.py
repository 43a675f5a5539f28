"""Commands on files of weights: what they print, convert and refuse."""

import flax.serialization
import jax.numpy as jnp
import numpy as np

import merge_jax as mj
from tests.commands.helpers import assert_equal_leaves, refused, said


def test_a_summary_of_weights(tmp_path, capsys):
    mj.save_safetensors(
        tmp_path / "m.safetensors", {"fc": {"kernel": jnp.ones((3, 4))}, "a": jnp.ones(2, jnp.bfloat16)}
    )
    printed = said(capsys, "summary", tmp_path / "m.safetensors", "--leaves", "**/kernel")
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith((" fc", " a"))}
    assert rows == {"fc": ["1", "12", "48", "float32"], "a": ["1", "2", "4", "bfloat16"]} | {"all": rows["all"]}
    assert rows["all"][:3] == ["2", "14", "52"]
    assert "fc/kernel  float32[3, 4]" in printed


def test_a_file_of_weights_is_converted_and_not_exported(tmp_path, capsys):
    (tmp_path / "m.npz").write_bytes(b"PK")
    message = refused(capsys, "export", tmp_path / "m.npz", tmp_path / "new.safetensors")
    assert "m.npz is a file, and checkpoints are folders: if it holds weights, merge-jax convert " in message


def test_weights_of_others_become_a_file_of_safetensors(tmp_path, capsys):
    tree = {"params": {"fc": {"kernel": np.ones((2, 3), np.float16)}}, "step": np.array(3)}
    (tmp_path / "m.bin").write_bytes(flax.serialization.to_bytes(tree))
    out = tmp_path / "m.safetensors"
    assert said(capsys, "convert", tmp_path / "m.bin", out) == (
        f"{tmp_path / 'm.bin'} (Flax msgpack): 1 leaves, 6 numbers: {out}\n"
    )
    assert_equal_leaves(mj.load_safetensors(out), {"params": tree["params"]})
    assert refused(capsys, "convert", tmp_path / "m.bin", out).endswith("is not overwritten: choose another name")
    assert "must end in .safetensors" in refused(capsys, "convert", tmp_path / "m.bin", tmp_path / "m.npz")
    said(capsys, "convert", tmp_path / "m.bin", tmp_path / "step.safetensors", "--select", "step")
    assert_equal_leaves(mj.load_safetensors(tmp_path / "step.safetensors"), {"step": tree["step"]})
    printed = said(capsys, "summary", tmp_path / "m.bin", "--leaves", "**/kernel")
    assert printed.startswith(f"{tmp_path / 'm.bin'}: Flax msgpack\n")
    assert "params/fc/kernel  float16[2, 3]" in printed
    assert "has no digests to verify" in refused(capsys, "summary", tmp_path / "m.bin", "--verify")
