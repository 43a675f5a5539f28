#!/usr/bin/env bash
# torchvision 0.29.1: fasterrcnn_resnet50_fpn, maskrcnn, keypointrcnn and retinanet set the epsilon of their frozen BatchNorm to 0 if they are
# made with the weights COCO_V1, and have 1e-5 if the same file is loaded by load_state_dict. fcos, made with its weights, has 1e-5.
# So the backbone of such a file is a ResNet-50 with another epsilon, which no tensor shows.
# Guess written down before the run: 1e-5 for each of them, as in resnet50.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torchvision==0.29.1 torch==2.14.1 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import os

import torch
from torchvision.models import detection, get_model_weights
from torchvision.ops import FrozenBatchNorm2d

os.makedirs(os.path.join(torch.hub.get_dir(), "checkpoints"))
for name in ("fasterrcnn", "maskrcnn", "retinanet", "fcos"):
    make = getattr(detection, f"{name}_resnet50_fpn")
    weights = get_model_weights(make).COCO_V1
    tensors = make(weights=None, weights_backbone=None).state_dict()  # Random ones, where the published file would be.
    file = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
    torch.save(tensors, file)
    norms = [module for module in make(weights=weights).modules() if isinstance(module, FrozenBatchNorm2d)]
    print(name, *{norm.eps for norm in norms}, end="; ")
    os.remove(file)
PY
echo "version: torchvision 0.29.1"
echo "expected: fasterrcnn 1e-05; maskrcnn 1e-05; retinanet 1e-05; fcos 1e-05; "
seen=$(TORCH_HOME="$folder/home" "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "fasterrcnn 0.0; maskrcnn 0.0; retinanet 0.0; fcos 1e-05; " ]]
