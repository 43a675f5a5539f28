#!/usr/bin/env bash
# jax 0.10.2 and 0.12.0.1 on a CPU: a loop over NumPy arrays that keeps one number of each holds nearly all of them on the
# device, since operations are dispatched faster than they are done; with block_until_ready in the loop it holds one or two.
# Guess written down before the run: either way one or two arrays of 16 MiB are there at a time, as Python frees each.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import threading

import jax
import jax.numpy as jnp
import numpy as np


def own_memory():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


leaves = [np.ones((1024, 4096), np.float32) for _ in range(16)]  # 16 MiB each
x = jnp.ones((1024, 1024))


def work(wait):
    sums = []
    for leaf in leaves:
        sums.append(jnp.dot(x, leaf).sum())
        if wait:
            sums[-1].block_until_ready()
    return jax.block_until_ready(sums)


def peak(wait):
    before, seen, done = own_memory(), [0], threading.Event()

    def look():
        while not done.wait(0.001):
            seen.append(own_memory() - before)

    thread = threading.Thread(target=look)
    thread.start()
    work(wait)
    done.set()
    thread.join()
    return max(seen) / 2**20


work(True)
for wait in (True, False):
    found = peak(wait)
    print("with" if wait else "without", "block_until_ready:", "few" if found < 64 else "many" if found > 128 else found)
PY
echo "version: jax 0.10.2, CPU; 16 arrays of 16 MiB, few: below 64 MiB, many: above 128 MiB"
echo "expected: few both ways"
seen=$("$folder/env/bin/python" "$folder/run.py")
echo "seen: $seen"
[ "$seen" = $'with block_until_ready: few\nwithout block_until_ready: many' ]
