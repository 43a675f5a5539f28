"""Several processes, on one host or many, that run one program together."""

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["await_all", "connect", "exit_on_error"]

_GO = b"go"
_HEARTBEAT = 20  # Seconds without a sign of life after which the others end; compiling does not stop it.
_SHUTDOWN = 10  # Seconds to wait for the others at the end; by default it is 300.


def connect(address: str, num_processes: int, process_id: int, *, timeout: float = 300.0) -> None:
    """Makes this process one of several that run the same program; call it before anything uses a device.

    The processes meet first, by a connection of ours: where one is missing, `jax.distributed.initialize` aborts the
    others at its timeout (SIGABRT, no exception, no name; jax 0.10 and 0.12), and names no port that is taken. Later,
    when one dies, the others end within seconds; see `exit_on_error`.

    Args:
      address: `host:port` of process 0, on which the others find it.
      num_processes: how many there are.
      process_id: which this is, from 0.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: a malformed address, a number out of range, or a port that process 0 cannot have.
      TimeoutError: process 0 could not be reached, or not all others came, in time.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"the coordinator's address must be host:port, got {address!r}")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise ValueError(f"process_id must lie in [0, {num_processes}), got {process_id}")
    deadline = time.monotonic() + timeout
    if process_id == 0:
        missing = _await_others(int(port), num_processes, deadline)
        who = f"process{'es' * (len(missing) > 1)} {', '.join(map(str, sorted(missing)))}"
        if missing:
            raise TimeoutError(f"{who} of {num_processes} did not come to {address} within {timeout:g} s")
    elif not _await_coordinator(host, int(port), process_id, deadline):
        raise TimeoutError(
            f"process {process_id} of {num_processes} found no coordinator at {address} within {timeout:g} s, "
            "or not all others came to it"
        )
    jax.distributed.initialize(
        address,
        num_processes,
        process_id,
        initialization_timeout=max(30, int(timeout)),
        heartbeat_timeout_seconds=_HEARTBEAT,
        shutdown_timeout_seconds=_SHUTDOWN,
    )


def await_all(problem: Exception | None) -> None:
    """Waits for all processes, each of which has met a problem or none; does nothing where there is one process.

    Raises:
      ValueError: another process has one, and this has none.
    """
    if jax.process_count() == 1:
        return
    having = multihost_utils.process_allgather(np.array(problem is not None))
    if problem is None and having.any():
        who = ", ".join(str(i) for i in np.flatnonzero(having))
        raise ValueError(f"this process could go on, but process {who} cannot: see what it says")


@contextlib.contextmanager
def exit_on_error(advice: str) -> Iterator[None]:
    """Ends one of several processes at once on an error; alone, errors pass as they are.

    An error that unwinds would wait for the other processes, which wait for it, for minutes. The others see that it is
    gone: at their next exchange of numbers, or when its heartbeat stops.

    Args:
      advice: what to do, printed after the error.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        first = str(error).partition("\n")[0][:200]
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} cannot go on, or another one has gone "
            f"({type(error).__name__}: {first}); {advice}",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(1)


def _await_others(port: int, num_processes: int, deadline: float) -> set[int]:
    """Waits for all others and lets them go; returns those that did not come."""
    missing, came = set(range(1, num_processes)), []
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise ValueError(f"process 0 cannot listen on port {port}: {error}") from None
    with server:
        while missing and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                connection.settimeout(1)
                word = connection.recv(16)
            except OSError:
                continue
            if word.isdigit() and int(word) in missing:
                missing.remove(int(word))
                came.append(connection)
            else:
                connection.close()
    for connection in came:
        with connection:
            if not missing:
                connection.sendall(_GO)
    return missing


def _await_coordinator(host: str, port: int, process_id: int, deadline: float) -> bool:
    """Waits until process 0 has seen all others."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(1, left)) as connection:
                connection.sendall(str(process_id).encode())
                connection.settimeout(left)
                if connection.recv(len(_GO)) == _GO:
                    return True
        except OSError:
            pass
        time.sleep(0.1)
    return False
