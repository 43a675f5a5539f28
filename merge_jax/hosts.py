"""Several processes, on one host or many, that run one program together."""

import socket
import time

import jax

__all__ = ["connect"]

_GO = b"go"


def connect(address: str, num_processes: int, process_id: int, *, timeout: float = 300.0) -> None:
    """Makes this process one of several that run the same program; call it before anything uses a device.

    The processes meet first, since JAX's own service ends a process without an exception when one is missing.

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
        missing = _gather(int(port), num_processes, deadline)
        who = f"process{'es' * (len(missing) > 1)} {', '.join(map(str, sorted(missing)))}"
        if missing:
            raise TimeoutError(f"{who} of {num_processes} did not come to {address} within {timeout:g} s")
    elif not _join(host, int(port), process_id, deadline):
        raise TimeoutError(
            f"process {process_id} of {num_processes} found no coordinator at {address} within {timeout:g} s, "
            "or not all others came to it"
        )
    jax.distributed.initialize(address, num_processes, process_id, initialization_timeout=max(30, int(timeout)))


def _gather(port: int, num_processes: int, deadline: float) -> set[int]:
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


def _join(host: str, port: int, process_id: int, deadline: float) -> bool:
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
