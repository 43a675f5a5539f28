#!/usr/bin/env bash
# submitit 1.5.4: a job of at most ten minutes that is preempted counts as one whose time is up, however soon: its "guaranteed" time is
# the smaller of 80 % and ten minutes less than the limit, which is not above zero. So a plain function is not put back into the queue.
# Guess written down before the run: a function of a job of 5 minutes, preempted in its first seconds, is put back and ends, as one of
# 60 minutes is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet submitit==1.5.4
cat >"$folder/plain.py" <<'PY'
import time
from pathlib import Path


def work(folder):
    starts = Path(folder, "starts")
    starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
    for _ in range(600 if starts.read_text() == "x" else 1):
        time.sleep(0.1)
    return "done"
PY
cat >"$folder/run.py" <<'PY'
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import submitit
from plain import work

found = {}
for minutes in (60, 5):
    folder = Path(sys.argv[1], str(minutes))
    executor = submitit.AutoExecutor(folder, cluster="local")
    executor.update_parameters(timeout_min=minutes)
    job = executor.submit(work, folder)
    while not (folder / "starts").exists():
        time.sleep(0.1)
    time.sleep(1)
    # The process of the function is the child of the one that submitit's local executor starts.
    child = subprocess.run(["ps", "-o", "pid=", "--ppid", job.job_id], capture_output=True, text=True).stdout.split()[0]
    os.kill(int(child), signal.SIGUSR2)
    try:
        found[minutes] = job.result()
    except Exception as error:
        found[minutes] = "timed-out and not checkpointable" if "timed-out and not checkpointable" in str(error) else repr(error)
print("; ".join(f"{minutes} minutes: {end}" for minutes, end in found.items()))
PY
echo "version: submitit 1.5.4"
echo "expected: 60 minutes: done; 5 minutes: done"
seen=$(cd "$folder" && env/bin/python run.py "$folder/jobs" 2>/dev/null)
echo "seen: $seen"
[ "$seen" = "60 minutes: done; 5 minutes: timed-out and not checkpointable" ]
