#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: arrays are stored under the keys of their path joined by dots. So {"head": {"kernel": x}, "head.kernel": y} has
# one name for two arrays: both are saved without an error or a warning of it, and both come back with the numbers of one of them. With
# a slash in the key instead of a dot, each comes back with its own.
# Guess written down before the run: both come back, or an error at the save.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import sys

import numpy as np
import orbax.checkpoint as ocp

nested, flat = np.full(3, 1, np.float32), np.full(3, 2, np.float32)
for number, key in enumerate(("head.kernel", "head/kernel")):
    tree = {"head": {"kernel": nested}, key: flat}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{sys.argv[1]}/{number}", tree)
        checkpointer.wait_until_finished()
        read = checkpointer.restore(f"{sys.argv[1]}/{number}", tree)
    same = [np.array_equal(read["head"]["kernel"], nested), np.array_equal(read[key], flat)]
    print(f"{key}: {'both as saved' if all(same) else 'one is lost'}")
PY
echo "version: orbax-checkpoint 0.12.8"
echo "expected: head.kernel: both as saved; head/kernel: both as saved"
seen=$("$folder/venv/bin/python" "$folder/run.py" "$folder" 2>/dev/null | paste -sd ';')
echo "seen: ${seen//;/; }"
[[ $seen == "head.kernel: one is lost;head/kernel: both as saved" ]]
