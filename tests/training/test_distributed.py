import socket
import threading
import time
from types import SimpleNamespace

import jax
import pytest

import merge_jax as mj
from merge_jax.training import distributed
from merge_jax.training.distributed import _await_coordinator, _await_others
from tests import helpers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost", 2, 0), "the coordinator's address must be host:port, got 'localhost'"),
        (("localhost:port", 2, 0), "must be host:port, got 'localhost:port'"),
        ((":80", 2, 0), "must be host:port, got ':80'"),
        (("localhost:99999", 2, 0), "must be host:port, got 'localhost:99999'"),
        (("localhost:80", 2, 2), r"process_id must lie in \[0, 2\), got 2"),
        (("localhost:80", 0, 0), r"process_id must lie in \[0, 0\), got 0"),
    ],
)
def test_a_wrong_address_or_number_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mj.training.connect(*arguments)


def test_a_coordinator_that_is_not_there_is_named_in_time(monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(distributed, "time", clock)
    address = f"localhost:{helpers.free_port()}"
    message = rf"process 1 of 2 found no coordinator at {address} within 0.3 s \(.*refused\): start process 0 first"
    with pytest.raises(TimeoutError, match=message):
        mj.training.connect(address, 2, 1, answer_within=0.3)
    assert now[0] < 1  # And not the 300 s in which others may come.


def test_a_coordinator_that_answers_is_waited_for_as_long_as_the_others_may_take():
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(TimeoutError, match=rf"process 1 of 3 waited 0.5 s at {address}, but not all other"):
            mj.training.connect(address, 3, 1, timeout=0.5, answer_within=0.2)


def test_where_no_cluster_is_found_or_half_of_an_address_is_given_it_is_refused(monkeypatch):
    def initialize(*unused, **options):
        raise ValueError("coordinator_address should be defined.")  # As JAX says it; nothing is asked of this machine.

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=r"JAX finds no cluster .* \(coordinator_address should be defined.\): .*srun"):
        mj.training.connect()
    with pytest.raises(ValueError, match=r"by all of address, num_processes and process_id, .* got 'a:1', 2 and None"):
        mj.training.connect("a:1", 2)


def test_processes_that_do_not_come_are_named():
    address = f"localhost:{helpers.free_port()}"
    with pytest.raises(TimeoutError, match=rf"processes 1, 2 of 3 did not connect to {address} within 0.3 s"):
        mj.training.connect(address, 3, 0, timeout=0.3)


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"process 0 cannot listen on port {port}: .*in use"):
            mj.training.connect(f"localhost:{port}", 2, 0, timeout=0.3)


def test_processes_meet_whoever_comes_first_and_strangers_are_passed_over():
    port, came = helpers.free_port(), []
    deadline = time.monotonic() + 20

    def join(process_id):
        _await_coordinator("localhost", port, process_id, 3, deadline, 20, 20)
        came.append(process_id)

    threads = [threading.Thread(target=join, args=(process_id,)) for process_id in (1, 2)]
    threads[0].start()  # Before process 0 listens.
    gathered = []
    zero = threading.Thread(target=lambda: gathered.append(_await_others(port, 3, deadline)))
    zero.start()
    while True:
        try:
            stranger = socket.create_connection(("localhost", port))
            break
        except OSError:
            continue
    with stranger:
        stranger.sendall(b"GET / HTTP/1.1")
        threads[1].start()
        for thread in (*threads, zero):
            thread.join(timeout=20)
    assert sorted(came) == [1, 2]
    assert gathered == [set()]
