#!/usr/bin/env bash
# distributed 2026.8.0: the scheduler, which runs no task, unpickles each one that is submitted. A package that client and workers have is
# not enough, though a call by `client.run` needs no more.
# Guess written down before the run: the scheduler passes pickled functions on, and needs Dask alone.
set -euo pipefail
folder=$(mktemp -d)
trap '{ kill -KILL $(jobs -p) && wait; } 2>/dev/null; rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet dask==2026.8.0 distributed==2026.8.0
mkdir "$folder/package"
echo "def work(): return 'done'" >"$folder/package/mine.py"
cd "$folder"
env/bin/dask scheduler --host 127.0.0.1 --port 0 --no-dashboard --scheduler-file scheduler.json 2>/dev/null &
until grep -qs '"address"' scheduler.json; do sleep 0.2; done
PYTHONPATH=package env/bin/dask worker --scheduler-file scheduler.json --nthreads 1 --no-nanny --no-dashboard 2>/dev/null &
cat >run.py <<'PY'
from distributed import Client
from mine import work

with Client(scheduler_file="scheduler.json", timeout=60) as client:
    client.wait_for_workers(1, timeout=60)
    (on_worker,) = client.run(work).values()
    try:
        submitted = client.submit(work).result(timeout=60)
    except RuntimeError as error:
        submitted = str(error).splitlines()[0]
print(f"called on the worker: {on_worker}; submitted: {submitted}")
PY
echo "version: distributed 2026.8.0"
echo "expected: called on the worker: done; submitted: done"
seen=$(PYTHONPATH=package env/bin/python run.py 2>/dev/null)
echo "seen: $seen"
[[ $seen == "called on the worker: done; submitted: Error during deserialization of the task graph"* ]]
