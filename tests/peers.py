"""A program for test_interruption.py: two processes of one run, one of which is stopped, dies, fails or is refused.

python -m tests.peers MODE FOLDER COORDINATOR PROCESS_ID
"""

import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import merge_jax as mj
from merge_jax.training.distributed import await_all, exit_on_error
from merge_jax.training.signals import StopSignals
from tests.training.test_loop import Counter

mode, folder, address, process_id = sys.argv[1:]


def main():
    mesh = mj.data_mesh()
    split = NamedSharding(mesh, PartitionSpec("data"))
    total = jax.make_array_from_callback((8,), split, lambda index: np.zeros(8, np.float32)[index])
    state = Counter(jax.device_put(jnp.int32(0), NamedSharding(mesh, PartitionSpec())), total)

    @jax.jit
    def step_fn(state, batches):
        del batches
        everyones = jnp.sum(state.total) * 0  # An exchange of numbers.
        return Counter(state.step + 1, state.total + 1 + everyones), {"x": everyones}

    def batches_at(step):
        if mode == "asked":
            time.sleep(0.05)
            if step == 2 and process_id == "1":
                os.kill(os.getpid(), signal.SIGTERM)
        elif mode == "frozen":
            if step == 3 and process_id == "0":
                os.kill(os.getpid(), signal.SIGSTOP)
        elif step == 3 and process_id == "1":
            if mode == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("something of this process alone")
        return {}

    with mj.Checkpoints(folder) as checkpoints, StopSignals() as signals:
        state = mj.run_loop(
            mj.stepwise(step_fn, batches_at),
            state,
            num_steps=100,
            report_every=2,
            report=lambda *unused: None,
            checkpoints=_Waiting(checkpoints),
            checkpoint_every=2,
            should_stop=signals.should_stop,
        )
        print(f"stopped at {int(state.step)}", flush=True)


class _Waiting:
    """Checkpoints whose saves have ended when they return, so that the test knows which there are."""

    def __init__(self, checkpoints):
        self._checkpoints = checkpoints

    def save(self, step, state, *, score):
        self._checkpoints.save(step, state, score=score)
        self._checkpoints.wait()


if __name__ == "__main__":
    mj.training.connect(address, 2, int(process_id), timeout=60, answer_within=60)
    if mode == "refused":
        problem = ValueError("the folder is full") if process_id == "0" else None
        try:
            await_all(problem)
        except ValueError as error:
            problem = error
        print(f"error: {problem}", flush=True)
        raise SystemExit(2)
    with exit_on_error("start both again"):
        main()
