"""Devices and processes that are not there are refused by one line."""

import numpy as np
from jax.sharding import AbstractMesh

from merge_jax.training.sharding import DATA_AXIS, jit_layout
from tests.bad_input import raises, refusals, refused

ROWS = {
    "devices too many": (
        refused("cross_structure", "--devices", "99", "--methods", "vanilla"),
        "the number of devices must lie in [1, 1], got 99",
    ),
    "devices 0": (refused("cross_structure", "--devices", "0"), "devices must be a whole number of at least 1, got 0"),
    "a batch that does not divide": (
        raises(lambda _: jit_layout(AbstractMesh((8,), (DATA_AXIS,))).put_indices({"target": np.zeros((2, 50))})),
        "a batch of 50 (target) does not divide among 8 devices: take a multiple of 8, or fewer devices",
    ),
    "processes without a coordinator": (
        refused("cross_structure", "--num-processes", "2"),
        "several processes need all of coordinator, num_processes and process_id",
    ),
    "a coordinator of one process": (
        refused("cross_structure", "--coordinator", "localhost:8080"),
        "several processes need all of coordinator, num_processes and process_id",
    ),
    "no address": (
        refused("cross_structure", "--coordinator", "here", "--num-processes", "2"),
        "the coordinator's address must be host:port, got 'here'",
    ),
    "hosts and an address": (
        refused("cross_structure", "--hosts", "--coordinator", "a:1", "--num-processes", "2", "--run-dir", "runs/x"),
        "hosts lets JAX find all processes: leave out coordinator, num_processes and process_id",
    ),
    "processes 0": (
        refused("cross_structure", "--num-processes", "0"),
        "num_processes must be a whole number of at least 1, got 0",
    ),
    "a process that is none": (
        refused("cross_structure", "--process-id", "3"),
        "process_id must lie in [0, 1), got 3",
    ),
}


test_bad_input_is_refused_in_one_line_that_names_it = refusals(ROWS)
