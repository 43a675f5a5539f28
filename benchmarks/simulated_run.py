"""A study's run that computes nothing: it lasts some seconds, saves regularly, and can be resumed.

python -m benchmarks.simulated_run --seconds 60 --run-dir runs/simulated
"""

import argparse
import json
import os
import signal
import time
from pathlib import Path

from merge_jax.checkpoints.files import write_whole
from merge_jax.checkpoints.lock import FolderLock

__all__ = ["main"]

_STEP = 0.1  # Seconds.


def main() -> None:
    """Lasts, and writes when it began, what it has done and a result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    folder: Path = options.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    if (folder / "config.json").exists() != options.resume:
        raise SystemExit("error: --resume is for a run that was begun, and for no other")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    saved = folder / "saved.json"
    done: float = json.loads(saved.read_text()) if saved.exists() else 0.0
    (folder / "config.json").write_text("{}")
    with (folder / "began.jsonl").open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), "time": time.time(), "done": done}) + "\n")
    until = time.monotonic() + options.seconds - done
    try:
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _STEP))
            if options.seconds > 10 * _STEP:
                write_whole(saved, json.dumps(options.seconds - max(until - time.monotonic(), 0)))
    except KeyboardInterrupt:
        print(f"stopped after {options.seconds - until + time.monotonic():.1f} s, which is saved", flush=True)
        raise SystemExit(128 + signal.SIGTERM) from None
    if options.code:
        print("a simulated failure", flush=True)
        raise SystemExit(options.code)
    write_whole(folder / "results.json", json.dumps([{"seconds": options.seconds}]))
    lock.release()


if __name__ == "__main__":
    main()
