"""benchmarks.soak: what it counts as lost and as silent, the damage that it does, and, slow, some of its events."""

import json

import numpy as np
import pytest

from benchmarks.soak import disturb
from benchmarks.soak_events import spoil
from benchmarks.soak_run import Soak, Tally
from benchmarks.soak_table import table_of
from benchmarks.torture_pair import KnownStates, compile_step, spoiled_batches_at


class Known:
    """States of an undisturbed run whose digests are their steps."""

    def digest(self, step):
        return str(step)


@pytest.fixture
def soak(tmp_path):
    soak = Soak(tmp_path / "run", tmp_path / "step", Known(), Tally(), None)
    soak.take([["restored", 0, "0", [], True], ["finished", 5], ["finished", 10], ["stopped", 12, "12"]])
    return soak


@pytest.mark.parametrize(
    ("restored", "counted"),
    [
        ((12, "12", [], True), {}),
        ((15, "15", [], True), {}),  # A save that had not ended may be there.
        ((10, "10", [], True), {"lost": 1, "notes": 1}),
        ((12, "x", [], True), {"silent": 1, "notes": 1}),
        ((12, "12", [], False), {"incomplete metrics": 1, "notes": 1}),
        ((12, "12", ["UserWarning: odd"], True), {"notes": 1}),
    ],
)
def test_what_comes_back_is_compared_with_what_is_known(soak, restored, counted):
    soak.check_start([["restored", *restored]], "kill")
    found = {"lost": soak.tally.lost, "silent": soak.tally.silent, **soak.tally.figures}
    assert {name: count for name, count in found.items() if count} == counted


def test_a_run_that_does_not_start_has_lost_what_was_saved_and_a_refusal_is_clear_or_not(soak):
    assert soak.check_start([["failed", "ValueError", "no"], ["ended", 1]], "kill") is None
    assert soak.tally.lost == 1
    assert soak.refusal([["failed", "OSError", "no space in /run"]], "disk", ("/run",))
    assert soak.refusal([["failed", "OSError", "no space"]], "disk", ("/run",))
    assert not soak.refusal([["stopped", 12, "12"]], "disk", ("/run",))
    assert (soak.tally.refused["disk"], soak.tally.unclear) == (1, 1)
    soak.take([["stopped", 20, "x"]])
    assert soak.tally.silent == 1


def test_damage_changes_what_is_there(tmp_path):
    for i in range(8):
        step = tmp_path / str(i) / "3"
        (step / "state").mkdir(parents=True)
        for name in ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "state/numbers"):
            (step / name).write_text(json.dumps({"custom_metadata": {}, "numbers": 50 * "1"}))

        def held(step=step):
            return {path: path.read_bytes() for path in step.rglob("*") if path.is_file()}

        before = held()
        spoil(step, np.random.default_rng(i))
        assert not step.is_dir() or held() != before


@pytest.mark.slow
def test_events_leave_a_run_that_goes_on(tmp_path):
    known = KnownStates(compile_step(tmp_path / "step"), spoiled_batches_at)
    soak = Soak(tmp_path / "run", tmp_path / "step", known, Tally(), None)
    random = np.random.default_rng(0)
    try:
        for name in ("sigterm", "kill", "damage", "two writers"):
            assert disturb(soak, random, name), soak.tally.notes
    finally:
        soak.close()
    tally = soak.tally
    assert (tally.lost, tally.silent, tally.unclear, tally.notes) == (0, 0, 0, [])
    assert tally.refused["writers"] == 1
    assert tally.finished > 0
    environment = {"cpu_count": 2, "versions": {"jax": "0"}, "date": "2026-01-01T00", "commit": "abc"}
    sizes = [{"saves": n, "rss": 2**27, "files": 5, "threads": 19} for n in (0, 10, 20, 30)]
    content = {"config": {"seed": 0}, "environment": environment, "seconds": 60, "full_disk": "no", "saves": {}}
    table = table_of({**content, "saves": {"sizes": sizes}, **vars(tally)})
    assert "| finished saves lost | 0 | 0 |" in table
    assert "| memory (MiB) after 10, 20, 30 saves | 128, 128, 128 | flat |" in table
