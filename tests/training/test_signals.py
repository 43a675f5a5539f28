"""Signals in this process and in others: the step that was reached is saved, and others stop with it."""

import os
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from merge_jax.checkpoints.orbax import Checkpoints, NotBitExactWarning
from merge_jax.training.loop import run_loop, stepwise
from merge_jax.training.signals import StopSignals
from tests import ROOT, helpers
from tests.training.test_loop import Counter, batches_at, start, step_fn


@pytest.fixture(autouse=True)
def _heard():
    """Ctrl-C is heard, also where the tests were started in a shell's background, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(checkpoints, should_stop, state=None, on_step=lambda step: None, num_steps=20):
    by_steps = stepwise(step_fn, batches_at)

    def advance(state, first, count):
        on_step(first)
        return by_steps(state, first, count)

    return run_loop(
        advance,
        state or start(),
        num_steps=num_steps,
        report_every=5,
        report=lambda *unused: None,
        checkpoints=checkpoints,
        checkpoint_every=10,
        should_stop=should_stop,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_step_in_which_a_signal_comes_is_finished_and_saved(tmp_path, number):
    before = signal.getsignal(number)
    with Checkpoints(tmp_path) as checkpoints, StopSignals() as signals:
        state = run(
            checkpoints, signals.should_stop, on_step=lambda step: os.kill(os.getpid(), number) if step == 6 else None
        )
        assert signals.received == number
        assert int(state.step) == 7
    assert signal.getsignal(number) is before
    with Checkpoints(tmp_path) as checkpoints, StopSignals() as signals:
        step, state = checkpoints.restore_latest(start())
        assert step == 7
        state = run(checkpoints, signals.should_stop, state)
    assert int(state.step) == 20
    assert float(state.total) == sum(range(20))


def test_a_second_interrupt_leaves_at_once_and_what_was_saved_is_whole(tmp_path):
    def twice(step):
        if step == 13:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path) as checkpoints, StopSignals() as signals:
        run(checkpoints, signals.should_stop, on_step=twice)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(start())[0] == 10


def test_a_second_sigterm_is_heard_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, StopSignals() as signals:
        state = run(
            checkpoints,
            signals.should_stop,
            on_step=lambda step: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)] if step == 3 else None,
        )
    assert int(state.step) == 4


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.should_stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_is_heard_and_nothing_fails():
    found = []

    def listen():
        with StopSignals() as signals:
            found.append(signals.should_stop())

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [False]


def test_without_a_signal_the_last_step_is_the_last(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, StopSignals() as signals:
        assert int(run(checkpoints, signals.should_stop).step) == 20
        assert checkpoints.steps == (10, 20)


def start_pair(mode, folder):
    """Two processes that run tests/peers.py together."""
    address = f"localhost:{helpers.free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.peers", mode, str(folder), address, str(process_id)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process_id in (0, 1)
    ]


def pair(mode, folder):
    """What two processes ended with and printed, before JAX's own limit of 300 seconds."""
    both = start_pair(mode, folder)
    outputs = [process.communicate(timeout=200)[0] for process in both]
    return [process.returncode for process in both], outputs


@pytest.mark.slow
def test_where_one_of_two_is_asked_to_stop_both_stop_at_the_same_step(tmp_path):
    codes, outputs = pair("asked", tmp_path)
    assert codes == [0, 0], outputs
    steps = [line for output in outputs for line in output.splitlines() if line.startswith("stopped")]
    assert len(steps) == 2
    assert steps[0] == steps[1]
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert f"stopped at {checkpoints.latest_step}" == steps[0]
        assert 3 <= checkpoints.latest_step < 100


@pytest.mark.parametrize("mode", ["killed", pytest.param("fails", marks=pytest.mark.slow)])
def test_where_one_of_two_dies_the_other_ends_in_seconds_and_says_why(tmp_path, mode):
    codes, outputs = pair(mode, tmp_path)
    assert codes[0] not in (0, None)
    assert codes[1] not in (0, None)
    assert "error: process 0 of 2 cannot go on, or another one has gone" in outputs[0], outputs[0]
    assert "start both again" in outputs[0]
    warning = pytest.warns(NotBitExactWarning, match=r"devices was 2, is 1; processes was 2, is 1$")
    with Checkpoints(tmp_path, read_only=True) as checkpoints, warning:
        step, state = checkpoints.restore_latest(Counter(jax.numpy.int32(0), jax.numpy.zeros(8)))
    assert step == 2
    np.testing.assert_array_equal(state.total, np.full(8, 2.0))
    if mode == "killed":  # It has no time to say so itself.
        assert "error: process 1 of 2 was ended from outside" in outputs[1]
        assert "start both again" in outputs[1]


@pytest.mark.slow
def test_where_process_0_is_frozen_the_other_is_aborted_and_our_message_comes_all_the_same(tmp_path):
    frozen, other = start_pair("frozen", tmp_path)
    try:
        output, _ = other.communicate(timeout=100)
    finally:
        frozen.kill()
        frozen.communicate()
    assert other.returncode == -signal.SIGABRT, output
    assert "error: process 1 of 2 was ended from outside, or by JAX as another one has gone; start both" in output
    with pytest.warns(NotBitExactWarning), Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.restore_latest(Counter(jax.numpy.int32(0), jax.numpy.zeros(8)))[0] == 2


@pytest.mark.slow
def test_where_one_of_two_is_refused_both_leave_and_the_other_says_who(tmp_path):
    codes, outputs = pair("refused", tmp_path)
    assert codes == [2, 2], outputs
    assert "error: the folder is full" in outputs[0]
    assert "error: this process could continue, but process 0 cannot: see its message" in outputs[1]
