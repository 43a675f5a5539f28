#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: the 20 minutes that a save may take are counted by time.time(). A clock that is set forward
# by more while a save runs, as after a machine was suspended, ends it with TimeoutError within a second.
# Guess written down before the run: only dates depend on the clock; patience is counted by one that is never set.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8 numpy==2.3.5
cat >"$folder/save.py" <<'PY'
import sys
import time
import numpy as np
from orbax.checkpoint import v1 as ocp

true_time = time.time
checkpointer = ocp.training.Checkpointer(
    sys.argv[1], save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1)
)
began, calls = time.monotonic(), [0]


def hurried():
    """Each look at the clock finds it an hour later."""
    calls[0] += 1
    return true_time() + 3600 * calls[0]


time.time = hurried
try:
    checkpointer.save(1, {"x": np.ones(3)})
    print("saved")
except TimeoutError as error:
    print(type(error).__name__, "in less than 60 s" if time.monotonic() - began < 60 else "")
PY
echo "version: orbax-checkpoint 0.12.8"
echo "expected: saved"
seen=$(JAX_PLATFORMS=cpu "$folder/env/bin/python" "$folder/save.py" "$folder/checkpoints" 2>/dev/null || true)
echo "seen: $seen"
[ "$seen" = "TimeoutError in less than 60 s" ]
