#!/usr/bin/env bash
# transformers 5.24.0: MobileNetV1, MobileNetV2 and EfficientNet pass 0.9997, 0.997 and 0.99 to PyTorch's BatchNorm as its momentum. That is the
# share that TensorFlow keeps, and in PyTorch the share that is replaced. So after training, the running statistics
# are those of the last batch alone, and evaluation depends on it.
# Guess written down before the run: the running mean of the first norm is near the average of the last ten batches.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.14.1 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import torch
from transformers import MobileNetV1Config, MobileNetV1Model, MobileNetV2Config, MobileNetV2Model

torch.set_num_threads(1)
for config, make in ((MobileNetV1Config, MobileNetV1Model), (MobileNetV2Config, MobileNetV2Model)):
    torch.manual_seed(0)
    model = make(config(depth_multiplier=0.25)).train()
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    means = []
    norm.register_forward_pre_hook(lambda _, inputs: means.append(inputs[0].mean((0, 2, 3))))
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(2, 3, 32, 32) + torch.randn(1))
    last, average = means[-1], torch.stack(means).mean(0)
    is_last = (norm.running_mean - last).abs().max() < 0.02 * (average - last).abs().max()
    print(make.__name__, "the last batch" if is_last else "an average", end="; ")
PY
echo "version: transformers 5.24.0, torch 2.14.1"
echo "expected: MobileNetV1Model an average; MobileNetV2Model an average; "
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "MobileNetV1Model the last batch; MobileNetV2Model the last batch; " ]]
