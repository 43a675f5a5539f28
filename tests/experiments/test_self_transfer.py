"""The experiment inside one model."""

from functools import partial

import jax
import numpy as np
import pytest

import merge_jax as mj
from experiments import self_transfer
from merge_jax.study.cli import parse
from tests.smoke import run

LITTLE = [
    *("--seeds", "1", "--steps", "4", "--report-every", "2", "--checkpoint-every", "2", "--labels", "40"),
    # Where every step transfers, the target's step is compiled once.
    *("--batch-size", "8", "--cycle", "1", "--stop", "1.0", "--num-heads", "2", "--validation", "20"),
]


def build(*options):
    return self_transfer.build(parse(self_transfer.PRESETS, "", "", list(options)))


@pytest.mark.slow
def test_a_text_model_gives_to_itself(tmp_path, monkeypatch):
    """An image classifier does in tests/study/test_resume.py."""
    monkeypatch.setattr(mj.models, "small_bert", partial(mj.models.small_bert, num_layers=2))
    (result,), records = run("self_transfer", tmp_path / "run", "text", *LITTLE, "--methods", "mergenet_warm_tf_kd")
    assert result["method"] == "mergenet_warm_tf_kd"
    assert result["source_test"] is None
    assert records[-1]["adapter/gate/encoder/layer_0/attention/query/kernel"] != 0
    assert all(np.isfinite(record["target/loss"]) for record in records)


@pytest.mark.parametrize("direction", ["deep_to_shallow", "shallow_to_deep"])
@pytest.mark.parametrize("preset", ["default", "text"])
def test_the_direction_says_which_side_gives(preset, direction):
    scenario = build(preset, *LITTLE, "--direction", direction)
    params, _ = jax.eval_shape(scenario.target.init, jax.random.key(0))
    rows = scenario.methods["share"].transfer.describe({}, params)
    pairs = [(row.target.split(" ")[0].removesuffix("/query/kernel"), row.source.split(" ")[0]) for row in rows]
    shallow, deep = {
        "default": ("stage1_0/expand/kernel", "stage3_0/expand/kernel"),
        "text": ("encoder/layer_0/attention", "encoder/layer_2/attention"),
    }[preset]
    target, source = (shallow, deep) if direction == "deep_to_shallow" else (deep, shallow)
    assert pairs[0][0].startswith(target)
    assert pairs[0][1].startswith(source)


def test_a_self_transfer_has_no_options_of_a_source(capsys):
    for option in ("--source", "--source-from", "--source-steps", "--snapshots"):
        with pytest.raises(SystemExit):
            parse(self_transfer.PRESETS, "", "", [option, "live"])
        assert option in capsys.readouterr().err


def test_bad_options_are_refused_by_name():
    for options, message in [
        (["--routes", "by depth"], 'routes "by depth" are for text models; name those of small_mobilenet_v2'),
        (["text", "--task", "qa", "--methods", "tf_kd"], "unknown method 'tf_kd'"),
        (["--routes", "a"], "a route must be target=source"),
        (["--model", "small_bert"], "unknown model 'small_bert'"),
    ]:
        preset = options[:1] if options[0] == "text" else []
        with pytest.raises(ValueError, match=message):
            build(*preset, *LITTLE, *options[len(preset) :])
