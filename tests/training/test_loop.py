import jax
import numpy as np
import pytest
from flax import struct

from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.training.loop import run_loop, stepwise


class Counter(struct.PyTreeNode):
    step: jax.Array
    total: jax.Array


@jax.jit
def step_fn(state, batches):
    total = state.total + batches["x"]
    return Counter(state.step + 1, total), {"x": batches["x"]}


def batches_at(step):
    return {"x": np.float32(step)}


def start(step=0):
    return Counter(jax.numpy.int32(step), jax.numpy.float32(0))


def run(state=None, advance=None, **options):
    reports = []
    state = run_loop(
        advance or stepwise(step_fn, batches_at),
        state or start(),
        report=lambda step, metrics, state: reports.append((step, metrics["x"], float(state.total))),
        **options,
    )
    return state, reports


def test_reports_are_means_since_the_last_and_the_last_step_reports():
    state, reports = run(num_steps=7, report_every=3)
    assert reports == [(3, 1.0, 3.0), (6, 4.0, 15.0), (7, 6.0, 21.0)]
    assert int(state.step) == 7


def test_the_first_report_of_a_run_that_goes_on_is_the_mean_of_its_own_steps():
    state, reports = run(start(2), num_steps=6, report_every=3)
    assert reports == [(3, 2.0, 2.0), (6, 4.0, 14.0)]
    assert int(state.step) == 6


@pytest.mark.parametrize(
    ("steps_per_call", "first", "expected"),
    [
        (1, 0, [(i, 1) for i in range(11)]),
        (3, 0, [(0, 3), (3, 1), (4, 3), (7, 1), (8, 3)]),
        (4, 0, [(0, 4), (4, 4), (8, 3)]),
        (100, 0, [(0, 4), (4, 4), (8, 3)]),
        (100, 6, [(6, 2), (8, 3)]),
    ],
)
def test_no_call_takes_steps_across_a_report(steps_per_call, first, expected):
    calls, counts = [], []
    by_steps = stepwise(step_fn, batches_at)

    def advance(state, first, count):
        assert int(state.step) == first
        calls.append((first, count))
        return by_steps(state, first, count)

    options = {"num_steps": 11, "report_every": 4, "steps_per_call": steps_per_call}
    _, reports = run(start(first), advance, on_steps=counts.append, **options)
    assert calls == expected
    assert counts == [count for _, count in expected]
    assert [step for step, *_ in reports] == [step for step in (4, 8, 11) if step > first]


@pytest.mark.parametrize("steps_per_call", [1, 400])
def test_metrics_in_bfloat16_have_the_mean_of_all_steps(steps_per_call):
    """Their sum in bfloat16 ends at 256 times the value: a further one is lost."""
    advance = stepwise(step_fn, lambda _: {"x": jax.numpy.bfloat16(1.5)})
    _, reports = run(advance=advance, num_steps=400, report_every=400, steps_per_call=steps_per_call)
    assert [mean for _, mean, _ in reports] == [1.5]


@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_metrics_of_several_seeds_become_arrays_of_means(steps_per_call):
    def seeds_at(step):
        return {"x": np.float32([step, 10 * step, -step])}

    state = Counter(jax.numpy.int32(0), jax.numpy.zeros(3))
    reports = []
    run_loop(
        stepwise(step_fn, seeds_at),
        state,
        num_steps=5,
        report_every=3,
        steps_per_call=steps_per_call,
        report=lambda step, metrics, state: reports.append(metrics["x"]),
    )
    assert [mean.tolist() for mean in reports] == [[1.0, 10.0, -1.0], [3.5, 35.0, -3.5]]


@pytest.mark.parametrize("steps_per_call", [1, 2, 5])
def test_a_run_goes_on_from_its_checkpoint_as_if_unbroken(tmp_path, steps_per_call):
    expected, reports = run(num_steps=8, report_every=2)
    options = {"report_every": 2, "steps_per_call": steps_per_call}
    with Checkpoints(tmp_path) as checkpoints:
        _, first = run(num_steps=4, checkpoints=checkpoints, checkpoint_every=2, **options)
    with Checkpoints(tmp_path) as checkpoints:
        step, state = checkpoints.restore_latest(start())
        assert step == 4
        state, second = run(state, num_steps=8, checkpoints=checkpoints, **options)
        assert checkpoints.latest_step == 8
    assert first + second == reports
    assert state.total == expected.total


@pytest.mark.parametrize("steps_per_call", [1, 5])
def test_saves_fall_on_their_steps_and_on_the_last(steps_per_call):
    class Saved:
        def __init__(self):
            self.steps = []

        def save(self, step, state, *, score):
            assert int(state.step) == step
            self.steps.append(step)

    saved = Saved()
    options = {"num_steps": 9, "report_every": 2, "steps_per_call": steps_per_call}
    run(checkpoints=saved, checkpoint_every=4, **options)
    run(checkpoints=saved, **options)
    assert saved.steps == [4, 8, 9, 9]


def test_a_finished_run_does_nothing():
    state, _ = run(num_steps=2, report_every=1)
    again, reports = run(state, num_steps=2, report_every=1)
    assert reports == []
    assert again is state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0, "report_every": 1}, "num_steps must be at least 1, got 0"),
        ({"num_steps": 1, "report_every": 0}, "report_every must be at least 1, got 0"),
        (
            {"num_steps": 1, "report_every": 1, "steps_per_call": 0},
            "steps_per_call must be at least 1, got 0",
        ),
        (
            {"num_steps": 4, "report_every": 2, "checkpoint_every": 3},
            "checkpoint_every must be a multiple of report_every, got 3 and 2",
        ),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
