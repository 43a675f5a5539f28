"""The joint step, its loop, devices and signals."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from merge_jax.training.distributed import connect
    from merge_jax.training.epoch import augmented, make_epoch
    from merge_jax.training.heads import Head, fit_head
    from merge_jax.training.joint import AdapterState, JointState, Task, TrainState, init_joint_state, make_joint_step
    from merge_jax.training.label_free import prepare
    from merge_jax.training.loop import run_loop, stepwise
    from merge_jax.training.nonfinite import NumericFaultError
    from merge_jax.training.optimizers import adapter_adamw
    from merge_jax.training.reparameterised import bake, make_reparameterised_step
    from merge_jax.training.running_statistics import reset_statistics
    from merge_jax.training.schedule import TransferSteps
    from merge_jax.training.seeds import over_seeds, stack_seeds, unstack_seeds
    from merge_jax.training.sharding import DATA_AXIS, Layout, data_mesh, jit_layout, pmap_layout, state_shardings
    from merge_jax.training.signals import StopSignals
    from merge_jax.training.trajectory import Trajectory, last_of, load_trajectory, replay_evenly, replayed

__all__ = [
    "DATA_AXIS",
    "AdapterState",
    "Head",
    "JointState",
    "Layout",
    "NumericFaultError",
    "StopSignals",
    "Task",
    "TrainState",
    "Trajectory",
    "TransferSteps",
    "adapter_adamw",
    "augmented",
    "bake",
    "connect",
    "data_mesh",
    "fit_head",
    "init_joint_state",
    "jit_layout",
    "last_of",
    "load_trajectory",
    "make_epoch",
    "make_joint_step",
    "make_reparameterised_step",
    "over_seeds",
    "pmap_layout",
    "prepare",
    "replay_evenly",
    "replayed",
    "reset_statistics",
    "run_loop",
    "stack_seeds",
    "state_shardings",
    "stepwise",
    "unstack_seeds",
]
