"""Runs a module like `python -m`, as long as standard input stays open.

The process that starts a run holds the other end of the pipe. When it closes it, or dies in any way, the run receives
SIGTERM, saves and ends, so no process is left on an abandoned machine.
"""

import os
import runpy
import signal
import sys
import threading

__all__ = ["main"]


def main() -> None:
    """Runs the module named by the first argument, with the remaining arguments."""
    module, *words = sys.argv[1:]
    if hasattr(signal, "SIGUSR2"):
        # Slurm sends it to all processes of a job when its time is nearly up; submitit handles it, and stops this one.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _stop_at_end_of_input() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
