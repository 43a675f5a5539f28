#!/usr/bin/env bash
# torch 2.14.1: HuggingFaceStorageWriter(save_distributed=True) writes a safetensors file for each process, and each has every sharded
# tensor under its own name, as a piece. The header has where the piece starts, and not how long the whole is. So the first part is like
# the file of a smaller model: load_file and safe_open read it without a word, and no index lies beside it.
# Guess written down before the run: a part names its tensors or itself as pieces, with the shape of the whole.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 torch==2.14.1 numpy==2.3.5
cat >"$folder/run.py" <<'PY'
import pathlib
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

folder = pathlib.Path(sys.argv[1])


def save(rank, count, name):
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}.meet", rank=rank, world_size=count)
    whole = torch.arange(6.0 * count).reshape(3 * count, 2)
    weight = distribute_tensor(whole, init_device_mesh("cpu", (count,)), [Shard(0)])
    dcp.save({"w": weight}, storage_writer=dcp.HuggingFaceStorageWriter(f"{folder}/{name}", save_distributed=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    headers = {}
    for count, name in ((2, "half_of_six_rows"), (1, "all_of_three")):
        torch.multiprocessing.spawn(save, (count, name), nprocs=count)
        files = sorted((folder / name).glob("*.safetensors"))
        with safe_open(files[0], "pt") as file:
            headers[name] = (file.metadata(), file.get_slice("w").get_shape())
            print(f"{len(files)} files, w of the first {headers[name][1]}", end="; ")
    half, whole = headers.values()
    print("headers alike" if half == whole else "headers differ")
PY
echo "version: torch 2.14.1"
echo "expected: 2 files, w of the first [3, 2]; 1 files, w of the first [3, 2]; headers differ"
seen=$(GLOO_SOCKET_IFNAME=lo "$folder/venv/bin/python" "$folder/run.py" "$folder" 2>/dev/null)
echo "seen: $seen"
[[ $seen == "2 files, w of the first [3, 2]; 1 files, w of the first [3, 2]; headers alike" ]]
