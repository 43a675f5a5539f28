"""Runs measurements in fresh processes, which have read, compiled and computed nothing before."""

import json
import subprocess
import sys
from typing import Any

__all__ = ["measure_apart"]


def measure_apart(module: str, *words: str) -> Any:
    """Returns what a benchmark's `measure(*words)` returns in a process of its own; its errors go to this one's."""
    code = f"import json, sys; from {module} import measure; print(json.dumps(measure(*sys.argv[1:])))"
    command = [sys.executable, "-W", "ignore", "-c", code, *words]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
