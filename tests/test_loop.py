import jax
import numpy as np
import pytest
from flax import struct

from merge_jax.checkpoint import Checkpoints
from merge_jax.loop import run_loop


class Counter(struct.PyTreeNode):
    step: jax.Array
    total: jax.Array


def step_fn(state, batches):
    total = state.total + batches["x"]
    return Counter(state.step + 1, total), {"x": batches["x"]}


def start():
    return Counter(jax.numpy.int32(0), jax.numpy.float32(0))


def run(state=None, **options):
    reports = []
    state = run_loop(
        jax.jit(step_fn),
        state or start(),
        lambda step: {"x": np.float32(step)},
        report=lambda step, metrics, state: reports.append((step, metrics["x"], float(state.total))),
        **options,
    )
    return state, reports


def test_reports_are_means_since_the_last_and_the_last_step_reports():
    state, reports = run(num_steps=7, report_every=3)
    assert reports == [(3, 1.0, 3.0), (6, 4.0, 15.0), (7, 6.0, 21.0)]
    assert int(state.step) == 7


def test_a_run_goes_on_from_its_checkpoint_as_if_unbroken(tmp_path):
    expected, reports = run(num_steps=8, report_every=2)
    with Checkpoints(tmp_path) as checkpoints:
        _, first = run(num_steps=4, report_every=2, checkpoints=checkpoints, checkpoint_every=2)
    with Checkpoints(tmp_path) as checkpoints:
        step, state = checkpoints.restore_latest(start())
        assert step == 4
        state, second = run(state, num_steps=8, report_every=2, checkpoints=checkpoints)
        assert checkpoints.latest_step == 8
    assert first + second == reports
    assert state.total == expected.total


def test_a_finished_run_does_nothing():
    state, _ = run(num_steps=2, report_every=1)
    again, reports = run(state, num_steps=2, report_every=1)
    assert reports == []
    assert again is state


def test_on_step_counts_the_steps_that_are_run():
    calls = []
    run(num_steps=5, report_every=2, on_step=lambda: calls.append(1))
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0, "report_every": 1}, "num_steps must be at least 1, got 0"),
        ({"num_steps": 1, "report_every": 0}, "report_every must be at least 1, got 0"),
        (
            {"num_steps": 4, "report_every": 2, "checkpoint_every": 3},
            "checkpoint_every must be a multiple of report_every, got 3 and 2",
        ),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
