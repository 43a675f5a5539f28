#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: a metric of NaN can be the best one, and the best checkpoint is removed for it.
# Guess written down before the run: NaN is never the best, whatever the order in which steps are saved.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8
cat >"$folder/best.py" <<'PY'
import sys
import numpy as np
import orbax.checkpoint as ocp

for name, scores in {"NaN first": [float("nan"), 0.9, 0.5], "NaN last": [0.9, 0.5, float("nan")]}.items():
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, best_fn=lambda metrics: metrics["score"], best_mode="max", enable_async_checkpointing=False
    )
    with ocp.CheckpointManager(f"{sys.argv[1]}/{name}", options=options) as manager:
        for step, score in enumerate(scores):
            manager.save(step, args=ocp.args.StandardSave({"x": np.ones(3)}), metrics={"score": score})
        kept = manager.all_steps()
    print(f"{name}: scores {scores}, kept {[scores[step] for step in kept]}")
PY
echo "version: orbax-checkpoint 0.12.8"
echo "expected: the step of the score 0.9 is kept both times"
seen=$("$folder/env/bin/python" "$folder/best.py" "$folder/steps" 2>/dev/null)
echo "seen:"
echo "$seen"
grep -q 'NaN first.*kept \[0.9\]' <<<"$seen" && grep -q 'NaN last.*kept \[nan\]' <<<"$seen"
