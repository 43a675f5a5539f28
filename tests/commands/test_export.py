"""`merge-jax export` by the names of another library."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import merge_jax as mj
from merge_jax.commands import main
from tests.models.test_efficientnet import TINY_MOBILE, random_variables


def saved(folder, variables):
    role = {"params": variables["params"], "model_state": {"batch_stats": variables["batch_stats"]}}
    with mj.Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"target": role})
    return folder


def test_a_model_is_exported_by_the_names_of_a_library(tmp_path, capsys):
    variables = random_variables(TINY_MOBILE(num_classes=3))
    folder, file = saved(tmp_path / "target-seed0", variables), tmp_path / "m.safetensors"
    main(["export", str(folder), str(file), "--names", "timm"])
    assert "with the names of timm; its own model reads them: network.load_state_dict" in capsys.readouterr().out
    expected, found = mj.models.to_pytorch(variables, "timm"), load_file(file)
    assert found.keys() == expected.keys()
    assert {"conv_stem.weight", "bn1.running_mean", "classifier.bias"} < found.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)
    with safe_open(file, "np") as opened:
        assert opened.metadata()["format"] == "pt"  # Which transformers asks for.
    for names, part, message in (
        ("huggingface", "target", "params are of no text model or vision transformer"),
        ("timm", "target/params", "--names timm is for a whole model, --part target or source; target/params is"),
    ):
        with pytest.raises(SystemExit):
            main(["export", str(folder), str(tmp_path / "other.safetensors"), "--names", names, "--part", part])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "other.safetensors").exists()
