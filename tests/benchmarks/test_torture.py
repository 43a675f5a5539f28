"""Each part of benchmarks.torture with the smallest number that means something; its aims are met, timings aside."""

import time
from dataclasses import replace

import pytest

from benchmarks import torture
from benchmarks.damage import DAMAGE
from benchmarks.torture_overhead import blocking
from benchmarks.torture_pair import batches_at, digest, initial_state

# Orbax leaves tasks behind when a file that it reads is damaged, and Python says so when it finds them.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TIMED = "digests"
SMALLEST = {
    "kills": 4,
    "flips": 20,
    "damage": 4,
    "resume": 3,
    "sigterm": 2,
    "nan": 20,
    "peer": 1,
    "frozen": 0,  # It takes JAX's whole patience.
    "writer": 1,
    "digests": 1,
    "overhead": 0,  # What it times is below; its own pair compiles for long.
}


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    with torture.prepare(tmp_path_factory.mktemp("torture")) as tools:
        yield tools


def test_every_part_is_here():
    assert SMALLEST.keys() == torture.PARTS.keys()
    assert len(DAMAGE) >= 26  # One of them is nothing to root.


@pytest.mark.parametrize("part", [part for part, n in SMALLEST.items() if n])
def test_a_part_comes_to_what_was_aimed_for(tools, tmp_path, part):
    outcome = torture.PARTS[part].function(replace(tools, folder=tmp_path), SMALLEST[part], 0)
    assert outcome.reached or part == TIMED, outcome
    assert outcome.result


def test_the_time_that_save_blocks_is_a_part_of_that_of_the_steps(tools, tmp_path):
    def advance(state):
        time.sleep(0.2)
        return tools.step(state, batches_at(0))[0]

    outcome = blocking(replace(tools, folder=tmp_path), 2, advance, initial_state(), 10)
    assert len(outcome.figures["saves"]) == 2
    assert min(outcome.figures["steps"]) >= 0.2
    assert outcome.figures["ratio"] > 0
    assert outcome.reached == (outcome.figures["ratio"] < 0.05)


def test_a_part_whose_aim_is_missed_says_so(tools, tmp_path):
    """Where the steps of the processes are others than those of the run they are compared with."""

    class Others:
        def digest(self, step):
            return digest(initial_state()) if step == 0 else "another"

    wrong = replace(tools, known=Others())
    for part in ("resume", "sigterm"):
        outcome = torture.PARTS[part].function(replace(wrong, folder=tmp_path), 1, 0)
        assert not outcome.reached
        assert outcome.result.startswith("0 of 1")


@pytest.mark.parametrize(
    ("options", "message"), [({"parts": ()}, "must name at least one of kills, "), ({"scale": 0.0}, "scale must be")]
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        torture.Config(**options).check()
