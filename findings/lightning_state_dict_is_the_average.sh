#!/usr/bin/env bash
# lightning 2.6.6: a checkpoint saved in training with EMAWeightAveraging (or any WeightAveraging) has the averaged weights under
# `state_dict`, and those that were trained under `current_model_state`, of the same names and shapes. Without the callback, `state_dict`
# has the trained ones. (In timm's checkpoints, `state_dict` is the trained model and `state_dict_ema` the average.)
# Guess written down before the run: `state_dict` has the trained weights, the callback's own state the average.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lightning==2.6.6 torch==2.13.0 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import sys

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 1)

    def training_step(self, batch, index):
        return ((self.fc(batch[0]) - 1) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Save(Callback):
    def on_train_batch_end(self, trainer, model, outputs, batch, index):
        self.trained = model.fc.weight.detach().clone()
        trainer.save_checkpoint(sys.argv[1])


torch.manual_seed(0)
batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 3)), 8)
for name, averaging in (("alone", []), ("with averaging", [EMAWeightAveraging(decay=0.9)])):
    save = Save()
    options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    lightning.Trainer(max_epochs=1, callbacks=[*averaging, save], **options).fit(Model(), batches)
    saved = torch.load(sys.argv[1], weights_only=False)
    found = [
        part
        for part in ("state_dict", "current_model_state")
        if part in saved and torch.equal(saved[part]["fc.weight"], save.trained)
    ]
    print(f"{name}: trained weights under {', '.join(found)}", end="; ")
PY
echo "version: lightning 2.6.6, torch 2.13.0"
echo "expected: alone: trained weights under state_dict; with averaging: trained weights under state_dict;"
seen=$("$folder/venv/bin/python" "$folder/run.py" "$folder/model.ckpt" 2>/dev/null | grep -o 'alone: .*')
echo "seen: $seen"
[[ $seen == "alone: trained weights under state_dict; with averaging: trained weights under current_model_state; " ]]
