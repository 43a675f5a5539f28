#!/usr/bin/env bash
# equinox 0.13.8: AdaptiveAvgPool2d averages other windows than PyTorch's, unless the output's size divides the input's. From 10 places
# to 7, PyTorch's windows overlap and all have 2 places or 3; Equinox cuts the axis into windows of 2 and of 1. So a VGG's features at
# another image size than 224 differ from those of torchvision's, with the same weights.
# Guess written down before the run: the same numbers, as of every other pooling layer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet equinox==0.13.8 jax==0.10.2 jaxlib==0.10.2 torch==2.14.1 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch

for places in (14, 10):
    pool = lambda x: eqx.nn.AdaptiveAvgPool1d(7)(x[None])[0]
    ours = np.asarray(jax.jacobian(pool)(jnp.zeros(places)))
    theirs = torch.nn.AdaptiveAvgPool1d(7)(torch.eye(places)[:, None])[:, 0].numpy().T
    sizes = ["".join(str(int(n)) for n in (weights > 0).sum(1)) for weights in (theirs, ours)]
    print(f"{places} to 7: windows of {sizes[0]} places in PyTorch, of {sizes[1]} in Equinox", end="; ")
PY
echo "version: equinox 0.13.8, torch 2.14.1"
echo "expected: 14 to 7: windows of 2222222 places in PyTorch, of 2222222 in Equinox; 10 to 7: windows of 2232322 in both"
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "14 to 7: windows of 2222222 places in PyTorch, of 2222222 in Equinox; \
10 to 7: windows of 2232322 places in PyTorch, of 2221111 in Equinox; " ]]
