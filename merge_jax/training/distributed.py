"""Several processes, on one or many hosts, running one program."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["await_all", "connect", "exit_on_error"]

_GO = b"go"
_SHUTDOWN = 10  # Seconds to wait for the others at the end; JAX's default is 300.
# Prints its first argument, unless a line comes before its input ends.
_LAST_WORDS = 'read line || printf "%s\\n" "$0" >&2'


def connect(
    address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300.0,
    answer_within: float = 10.0,
    lost_after: int = 8,
) -> None:
    """Joins this process with others that run the same program; call it before anything uses a device.

    Without arguments, JAX detects processes started by a cluster: Slurm, Kubernetes with
    `pip install kubernetes` (GKE with GPUs), Cloud TPU (GKE too), Open MPI.

    With an address, the processes first connect through a socket of ours, which names missing processes. By itself,
    `jax.distributed.initialize` aborts the others at its timeout (SIGABRT, no exception, no name; jax 0.10 and 0.12),
    and does not report an occupied port. If a process is lost later, the others exit within seconds; see
    `exit_on_error`.

    Args:
      address: `host:port` of process 0, which the others connect to.
      num_processes: the number of processes.
      process_id: the index of this process, from 0.
      timeout: seconds to wait for the others.
      answer_within: seconds within which process 0 must answer at the address.
      lost_after: seconds without a heartbeat after which a process counts as lost. A busy process still sends
        heartbeats, a frozen machine does not.

    Raises:
      ValueError: a malformed address, a number out of range, an unavailable port on process 0, only some of the
        arguments, or no cluster.
      TimeoutError: process 0 could not be reached, or not all others connected, in time.
    """
    if address is None or num_processes is None or process_id is None:
        if (address, num_processes, process_id) != (None, None, None):
            raise ValueError(
                "processes meet by all of address, num_processes and process_id, or by none of them in a cluster, got"
                f" {address!r}, {num_processes} and {process_id}"
            )
        _join(None, None, None, timeout, lost_after)
        return
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
            raise TimeoutError(f"{who} of {num_processes} did not connect to {address} within {timeout:g} s")
    else:
        _await_coordinator(host, int(port), process_id, num_processes, deadline, timeout, answer_within)
    _join(address, num_processes, process_id, timeout, lost_after)


def _join(
    address: str | None, num_processes: int | None, process_id: int | None, timeout: float, lost_after: int
) -> None:
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            initialization_timeout=max(30, int(timeout)),
            heartbeat_timeout_seconds=lost_after,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except (ValueError, RuntimeError) as error:
        if address is not None:
            raise
        raise ValueError(
            f"JAX finds no cluster that has started this process ({error}): start it by srun, in a Kubernetes job"
            " (pip install kubernetes), on Cloud TPU or by mpirun, or give the address, number and id of the processes"
        ) from None


def await_all(problem: Exception | None) -> None:
    """Waits for all processes and shares whether one has a problem; does nothing with a single process.

    Raises:
      ValueError: another process has a problem, and this one has none.
    """
    if jax.process_count() == 1:
        return
    having = multihost_utils.process_allgather(np.array(problem is not None))
    if problem is None and having.any():
        who = ", ".join(str(i) for i in np.flatnonzero(having))
        raise ValueError(f"this process could continue, but process {who} cannot: see its message")


@contextlib.contextmanager
def exit_on_error(advice: str) -> Iterator[None]:
    """Exits one of several processes at once on an error; a single process raises errors normally.

    A process unwinding an error would wait minutes for the others, which wait for it. The others notice its exit at
    their next collective operation, or when its heartbeats stop. Then JAX aborts them, and no Python code runs any
    more. So a small process (`sh`), which waits for this one to end, prints the message.

    Enter it after `connect`.

    Args:
      advice: what to do, printed after the error.
    """
    # Asking JAX for the number would initialise its devices.
    keeper = _keep_last_words(advice) if jax.distributed.is_initialized() else None
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        first = str(error).partition("\n")[0][:200]
        print(
            f"error: {_who()} cannot go on, or another one has gone ({type(error).__name__}: {first}); {advice}",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        if keeper is not None:
            keeper.communicate(b"\n")
        os._exit(1)
    finally:
        if keeper is not None:
            keeper.communicate(b"\n")


def _keep_last_words(advice: str) -> subprocess.Popen[bytes]:
    """Starts a process that prints our message if this one ends without writing a line to it."""
    message = f"error: {_who()} was ended from outside, or by JAX as another one has gone; {advice}"
    return subprocess.Popen(
        ["sh", "-c", _LAST_WORDS, message],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # It must survive Ctrl-C.
    )


def _who() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def _await_others(port: int, num_processes: int, deadline: float) -> set[int]:
    """Waits for all others and releases them; returns those that never connected."""
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


def _await_coordinator(
    host: str, port: int, process_id: int, num_processes: int, deadline: float, timeout: float, answer_within: float
) -> None:
    """Waits until process 0 has met all others; raises TimeoutError if it does not answer or others are missing."""
    who, answered = f"process {process_id} of {num_processes}", False
    no_answer = min(deadline, time.monotonic() + answer_within)
    problem: OSError | None = None
    while (left := (deadline if answered else no_answer) - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(1, left)) as connection:
                answered = True
                connection.sendall(str(process_id).encode())
                connection.settimeout(max(0.1, deadline - time.monotonic()))
                if connection.recv(len(_GO)) == _GO:
                    return
        except OSError as error:
            problem = error
        time.sleep(0.1)
    if not answered:
        waited = min(answer_within, timeout)
        raise TimeoutError(
            f"{who} found no coordinator at {host}:{port} within {waited:g} s ({problem}): start process 0 first, or"
            " correct the address"
        )
    raise TimeoutError(f"{who} waited {timeout:g} s at {host}:{port}, but not all other processes connected")
