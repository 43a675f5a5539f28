#!/usr/bin/env bash
# Grain 0.2.18: a slice of a shuffled MapDataset is another part in every epoch. `shuffle(seed)` has one order for each epoch, and
# repeat() behind the slice asks for the next one. So two slices of one shuffle, with one seed, are no split: what the first epoch has
# held out is trained on in the second. (An index past the end is no IndexError either: it is one of the next epoch.)
# Expected, though not written down before the first run: shuffle(seed).slice(0:80) holds the same examples in every epoch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet grain==0.2.18 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import grain

shuffled = grain.MapDataset.range(100).shuffle(seed=0)
train, held_out = shuffled.slice(slice(0, 80)), shuffled.slice(slice(80, 100))
for epochs in (1, 2):
    met = set(train.repeat(epochs)) & set(held_out)
    print(f"{epochs} epochs: {len(met)} of {len(held_out)} held out are trained on")
split_first = grain.MapDataset.range(100).slice(slice(0, 80)).shuffle(seed=0).repeat(2)
print(f"sliced, then shuffled: {len(set(split_first) - set(range(80)))}")
PY
echo "version: grain 0.2.18"
echo "expected: none in 1 epoch, none in 2, none where the slice comes first"
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen:"
echo "$seen"
grep -q "^1 epochs: 0 of 20" <<<"$seen" && ! grep -q "^2 epochs: 0 of 20" <<<"$seen" && grep -qx "sliced, then shuffled: 0" <<<"$seen"
