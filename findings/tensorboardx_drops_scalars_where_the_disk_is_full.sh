#!/usr/bin/env bash
# tensorboardX 2.6.5: a write that fails, as on a full disk, ends the thread of SummaryWriter. add_scalar raises nothing
# then, and what it takes is lost; its queue of ten fills up.
# Guess written down before the run: the thread may end, and close() says what went wrong.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet tensorboardX==2.6.5 numpy==2.3.5
cat >"$folder/write.py" <<'PY'
import os
import sys
import time
from tensorboardX import SummaryWriter

writer = SummaryWriter(sys.argv[1], flush_secs=0)
events = writer.file_writer.event_writer
file = events._ev_writer._py_recordio_writer._writer
with open("/dev/full", "wb") as device:
    os.dup2(device.fileno(), file.fileno())
raised = 0
for step in range(5):
    try:
        writer.add_scalar("loss", 1.0, step)
    except OSError:
        raised += 1
    time.sleep(0.5)
print(f"add_scalar raised {raised} times, its thread is", "alive" if events._worker.is_alive() else "gone", flush=True)
os._exit(0)
PY
echo "version: tensorboardX 2.6.5"
echo "expected: an error, by add_scalar at the latest after the first write failed"
seen=$("$folder/env/bin/python" "$folder/write.py" "$folder/events" 2>/dev/null)
echo "seen: $seen"
[ "$seen" = "add_scalar raised 0 times, its thread is gone" ]
