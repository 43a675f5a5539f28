#!/usr/bin/env bash
# torch 2.14.1: interpolate(mode="bicubic", antialias=True) enlarges with another cubic (a = -0.5) than antialias=False (a = -0.75).
# timm and JAX resize the positions of a ViT with the first, Hugging Face with the second. From 7x7 to 14x14 positions, the results
# differ by a quarter of their standard deviation, though nothing can alias. For bilinear the option changes nothing.
# Guess written down before the run: the same for both values of antialias, which matters only where an image shrinks.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import jax
import numpy as np
import torch

x = torch.randn(1, 64, 7, 7, generator=torch.Generator().manual_seed(0))
for mode in ("bilinear", "bicubic"):
    plain, smooth = (torch.nn.functional.interpolate(x, (14, 14), mode=mode, antialias=on).numpy() for on in (False, True))
    inside = np.s_[:, :, 4:-4, 4:-4]
    differ = "differ" if np.abs(plain - smooth)[inside].max() > 0.1 * smooth.std() else "agree"
    theirs = np.asarray(jax.image.resize(x.numpy(), smooth.shape, mode))
    like = "with" if np.abs(theirs - smooth).max() < 1e-4 else "without"
    print(f"{mode}: with and without antialias {differ}" + (f", JAX is as {like}" if differ == "differ" else ""), end="; ")
PY
echo "version: torch 2.14.1"
echo "expected: bilinear: with and without antialias agree; bicubic: with and without antialias agree;"
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "bilinear: with and without antialias agree; bicubic: with and without antialias differ, JAX is as with; " ]]
