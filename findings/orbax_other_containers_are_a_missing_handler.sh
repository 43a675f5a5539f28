#!/usr/bin/env bash
# orbax-checkpoint 0.12.8, its v1 interface: the same arrays under the same keys, asked for with a None less or in another container,
# are refused by an error about registered handlers that names no part of the tree; () for None and a tuple for a list are taken.
# Guess written down before the run: arrays are restored by key, or an error names the key where the trees differ, alike in all cases.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8
cat >"$folder/load.py" <<'PY'
import sys
import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

x = jnp.ones(2)
cases = {
    "the same tree": ({"w": x, "n": None}, {"w": x, "n": None}),
    "() in the place of None": ({"w": x, "n": ()}, {"w": x, "n": None}),
    "a tuple in the place of a list": ({"w": [x, x]}, {"w": (x, x)}),
    "a None less": ({"w": x, "n": None}, {"w": x}),
    "a dictionary of the same keys in the place of a list": ({"w": [x, x]}, {"w": {"0": x, "1": x}}),
}
shapes = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
for number, (name, (saved, wanted)) in enumerate(cases.items()):
    with ocp.training.Checkpointer(f"{sys.argv[1]}/{number}") as checkpointer:
        checkpointer.save(1, saved)
        try:
            checkpointer.load(1, shapes(wanted))
            print(f"{name}: restored")
        except Exception as error:
            print(f"{name}: {type(error).__name__}, handler {'handler' in str(error)}, key {repr('n') in str(error)}")
PY
echo "version: orbax-checkpoint 0.12.8"
echo "expected: each is restored, or refused by an error that names what differs"
seen=$("$folder/env/bin/python" "$folder/load.py" "$folder/checkpoints" 2>/dev/null)
echo "seen:"
echo "$seen"
grep -q '^the same tree: restored' <<<"$seen" && grep -q '^() in the place of None: restored' <<<"$seen" &&
  grep -q '^a tuple in the place of a list: restored' <<<"$seen" &&
  grep -q '^a None less: NoEntryError, handler True, key False' <<<"$seen" &&
  grep -q '^a dictionary of the same keys in the place of a list: NoEntryError, handler True, key False' <<<"$seen"
