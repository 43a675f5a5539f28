#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: each save_async of v1's training.Checkpointer starts a thread with an event loop, three open
# files. Neither wait() nor close() ends it; only result() of what save_async returned does. The default limit of 1024
# open files is reached after some 340 saves.
# Guess written down before the run: after wait(), threads and open files are as many as after the first save.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8 numpy==2.3.5
cat >"$folder/save.py" <<'PY'
import os
import sys
import threading
import numpy as np
from orbax.checkpoint import v1 as ocp

every = ocp.training.save_decision_policies.FixedIntervalPolicy(1)


def held():
    return np.array([threading.active_count(), len(os.listdir("/proc/self/fd"))])


for way in ("wait", "result"):
    with ocp.training.Checkpointer(f"{sys.argv[1]}-{way}", save_decision_policy=every) as checkpointer:
        for step in range(12):
            response = checkpointer.save_async(step, {"x": np.ones(3)})
            if way == "result":
                response.result()
            checkpointer.wait()
            if step == 1:
                before = held()
        print(way, *(held() - before))
PY
echo "version: orbax-checkpoint 0.12.8"
echo "expected of ten more saves: 0 more threads, 0 more open files"
seen=$(JAX_PLATFORMS=cpu "$folder/env/bin/python" "$folder/save.py" "$folder/checkpoints" 2>/dev/null)
echo "seen (threads, open files):"
echo "$seen"
[ "$seen" = $'wait 10 30\nresult 0 0' ]
