#!/usr/bin/env bash
# distributed 2026.8.0: futures of Client.get_executor(), "fully compatible with the concurrent.futures API", are pending until they end.
# cancel() of a call that a worker is at returns True, and the call goes on to its end; shutdown() does not take cancel_futures.
# Guess written down before the run: as in concurrent.futures, cancel() of what runs returns False, running() True, and
# shutdown(cancel_futures=True) cancels what waits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet dask==2026.8.0 distributed==2026.8.0
cat >"$folder/run.py" <<'PY'
import sys
import time
from pathlib import Path

from distributed import Client, LocalCluster


def work(folder):
    Path(folder, "begun").touch()
    time.sleep(3)
    Path(folder, "ended").touch()


if __name__ == "__main__":
    folder = sys.argv[1]
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster, Client(cluster) as client:
        executor = client.get_executor()
        future = executor.submit(work, folder)
        while not Path(folder, "begun").exists():
            time.sleep(0.1)
        said = f"running {future.running()}, cancel {future.cancel()}"
        time.sleep(6)
        try:
            executor.shutdown(cancel_futures=True)
            shutdown = "taken"
        except TypeError:
            shutdown = "TypeError"
        print(f"{said}, ended all the same {Path(folder, 'ended').exists()}, cancel_futures {shutdown}")
PY
mkdir "$folder/work"
echo "version: distributed 2026.8.0"
echo "expected: running True, cancel False, ended all the same True, cancel_futures taken"
seen=$("$folder/env/bin/python" "$folder/run.py" "$folder/work" 2>/dev/null)
echo "seen: $seen"
[ "$seen" = "running False, cancel True, ended all the same True, cancel_futures TypeError" ]
