import contextlib
import json
import math
import os
import re
import struct
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from merge_jax.runs import folder as runs
from merge_jax.runs.folder import MetricsLog, RunFolder, check_space, numbered_folder

CONFIG = {"steps": 10, "methods": ("a", "b")}


def test_a_new_folder_explains_itself(tmp_path):
    folder = RunFolder.open(tmp_path / "runs" / "first", CONFIG, resume=False)
    assert json.loads((folder.path / "config.json").read_text()) == {
        "steps": 10,
        "methods": ["a", "b"],
    }
    (environment,) = json.loads((folder.path / "environment.json").read_text())
    assert {"command", "date", "python", "devices", "versions", "commit"} <= environment.keys()
    assert environment["versions"]["jax"][0].isdigit()
    assert "metrics.jsonl" in (folder.path / "README.md").read_text()


def test_an_empty_folder_is_taken(tmp_path):
    assert RunFolder.open(tmp_path, CONFIG, resume=False).path == tmp_path


def test_a_run_can_be_resumed_with_the_same_config_only(tmp_path):
    RunFolder.open(tmp_path, CONFIG, resume=False)
    RunFolder.open(tmp_path, CONFIG, resume=True)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 2
    changed = {"steps": 20, "methods": ("a", "b"), "new": 1}
    with pytest.raises(ValueError, match=r"another config:\n  new was '\(absent\)', is 1\n  steps was 10, is 20\nGive"):
        RunFolder.open(tmp_path, changed, resume=True)
    with pytest.raises(ValueError, match="exists with another config:\n  steps was 10, is 20"):
        RunFolder.open(tmp_path, {**CONFIG, "steps": 20}, resume=False)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 10


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, resume):
    (tmp_path / "file").write_text("mine")
    reason = "no run to resume" if resume else "cannot be written"
    with pytest.raises(ValueError, match=reason):
        RunFolder.open(tmp_path / "file" / "run", CONFIG, resume=resume)
    reason = "no run to resume" if resume else "is not empty, and no run"
    with pytest.raises(ValueError, match=reason):
        RunFolder.open(tmp_path, CONFIG, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_is_not_overwritten(tmp_path):
    RunFolder.open(tmp_path, CONFIG, resume=False)
    with pytest.raises(ValueError, match="already holds this run: add --resume"):
        RunFolder.open(tmp_path, CONFIG, resume=False)


def test_a_run_is_known_by_what_its_paths_hold_wherever_that_lies(tmp_path):
    config = {"seeds": 1, "source_from": "/old/run", "contents": {"source_from": "content 12"}}
    RunFolder.open(tmp_path / "new", config, resume=False).close()
    moved = {**config, "source_from": "/other/place"}
    RunFolder.open(tmp_path / "new", moved, resume=True).close()
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == config
    other = {**moved, "contents": {"source_from": "content 34"}}
    with pytest.raises(ValueError, match=r"another config:\n  source_from was 'content 12', is 'content 34'\nGive"):
        RunFolder.open(tmp_path / "new", other, resume=True)
    # Paths of nothing, and runs of before contents were kept, are known by the paths.
    with pytest.raises(ValueError, match=r"another config:\n  source_from was '/old/run', is '/other/place'\nGive"):
        RunFolder.open(tmp_path / "new", {**moved, "contents": {}}, resume=True)
    RunFolder.open(tmp_path / "old", {"seeds": 1, "source_from": "/old/run"}, resume=False).close()
    RunFolder.open(tmp_path / "old", config, resume=True).close()
    with pytest.raises(ValueError, match=r"another config:\n  source_from was '/old/run', is '/other/place'\nGive"):
        RunFolder.open(tmp_path / "old", moved, resume=True)


def test_folders_that_are_made_at_once_have_numbers_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begin, taken = threading.Barrier(8), []

    def take(number):
        begin.wait()
        with numbered_folder("mine") as folder:
            (folder / "by").write_text(str(number))
            taken.append(folder)

    threads = [threading.Thread(target=take, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, taken)) == [f"runs/mine-{i:03d}" for i in range(1, 9)]
    assert len({(folder / "by").read_text() for folder in taken}) == 8


def test_a_numbered_folder_that_stays_empty_is_removed_and_the_last_run_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with numbered_folder("mine", resume=True) as folder:
        assert str(folder) == "runs/mine-001"
        assert not folder.exists()
    with numbered_folder("mine") as folder:
        assert folder.is_dir()
    assert not folder.exists()
    for number in ("001", "002", "010"):
        with numbered_folder("mine" if number < "010" else "mine-of-others") as folder:
            RunFolder.open(folder, CONFIG, resume=False).close()
    with numbered_folder("mine") as taken, numbered_folder("mine", resume=True) as folder:
        assert (str(taken), str(folder)) == ("runs/mine-003", "runs/mine-002")  # No run has begun in the third.
    with numbered_folder("mine", given=tmp_path / "given") as folder:
        assert folder == tmp_path / "given"
    (tmp_path / "runs" / "file").write_text("")
    monkeypatch.setattr(runs, "_RUNS", tmp_path / "runs" / "file")
    with pytest.raises(ValueError, match=r"the run folder .*file/mine-001 cannot be written"), numbered_folder("mine"):
        pass


def test_a_damaged_config_is_named(tmp_path):
    RunFolder.open(tmp_path, CONFIG, resume=False)
    (tmp_path / "config.json").write_text('{"steps": 1')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        RunFolder.open(tmp_path, CONFIG, resume=True)


def test_a_folder_has_one_writer(tmp_path):
    first = RunFolder.open(tmp_path, CONFIG, resume=False)
    with pytest.raises(ValueError, match=rf"another run is writing into {re.escape(str(tmp_path))} \(process \d+ on "):
        RunFolder.open(tmp_path, CONFIG, resume=True)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1
    first.close()
    RunFolder.open(tmp_path, CONFIG, resume=True)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 2


def test_a_disk_without_room_is_named_and_what_is_there_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    folder = tmp_path / "absent" / "run"
    check_space(folder, 2**30)
    message = (
        r"the disk of .*absent/run has 1 GiB left, and the checkpoints of this run may need 1.5 GiB: free some space"
    )
    with pytest.raises(ValueError, match=message):
        check_space(folder, 3 * 2**29)
    assert not folder.parent.exists()
    folder.mkdir(parents=True)
    (folder / "saved").write_bytes(bytes(1000))
    check_space(folder, 2**30 + 1000)
    with pytest.raises(ValueError, match="free some space"):
        check_space(folder, 2**30 + 1001)


def test_metrics_are_one_record_a_report_and_rewind_to_a_step(tmp_path):
    folder = RunFolder.open(tmp_path, CONFIG, resume=False)
    log = MetricsLog(folder)
    assert log.records() == []
    for run in ("a", "b"):
        with log.writer(run, 0) as writer:
            writer.write(5, {"target/loss": 1.5})
            writer.write(10, {"target/loss": math.nan})
    log.rewind("a", 5)
    assert log.records() == [
        {"run": "a", "step": 5, "target/loss": 1.5},
        {"run": "b", "step": 5, "target/loss": 1.5},
        {"run": "b", "step": 10, "target/loss": "nan"},
    ]
    assert list((tmp_path / "tensorboard" / "a").iterdir())


def events_of(path):
    """The events of a file of TensorBoard: each has its length in 8 bytes, a sum of 4, itself, and a sum of 4."""
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[length + 16 :]
    return found


def test_events_are_scalars_and_those_of_a_later_start_hide_what_went_after_it(tmp_path):
    log = MetricsLog(RunFolder.open(tmp_path, CONFIG, resume=False))
    with log.writer("a", 5) as writer:
        writer.write(6, {"target/loss": 1.5, "source/loss": 2.0})
    (file,) = (tmp_path / "tensorboard" / "a").iterdir()
    version, start, *scalars = events_of(file)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (6, SessionLog.START)
    found = [(event.step, value.tag, value.simple_value) for event in scalars for value in event.summary.value]
    assert found == [(6, "target/loss", 1.5), (6, "source/loss", 2.0)]


@pytest.mark.parametrize("full", ["events", "records"])
def test_a_full_disk_ends_the_run_and_is_named(tmp_path, monkeypatch, full):
    """By tensorboardX's own writer it was the eleventh scalar that waited for ever."""
    monkeypatch.setattr("merge_jax.runs.folder._FLUSH", 0)
    log = MetricsLog(RunFolder.open(tmp_path, CONFIG, resume=False))
    message = rf"No space left on device: '{'/dev/full' if full == 'records' else tmp_path / 'tensorboard' / 'a'}'"

    writer = log.writer("a", 0)
    if full == "records":
        monkeypatch.setattr(writer, "_path", Path("/dev/full"))
    else:
        with open("/dev/full", "wb") as device:
            os.dup2(device.fileno(), writer._writer._writer.fileno())
    with pytest.raises(OSError, match=message):
        writer.write(1, {f"loss {i}": 1.0 for i in range(30)})
    with pytest.raises(OSError, match=message) if full == "events" else contextlib.nullcontext():
        writer.__exit__()  # What is left could not be written either.


def test_a_folder_whose_process_was_killed_as_it_made_it_is_as_good_as_new(tmp_path):
    (tmp_path / "run.lock").write_text("")
    (tmp_path / "config.json.part").write_text('{"ste')
    assert RunFolder.open(tmp_path, CONFIG, resume=False).read_json("config.json", {})["steps"] == 10


def test_a_record_that_was_cut_off_is_forgotten(tmp_path):
    log = MetricsLog(RunFolder.open(tmp_path, CONFIG, resume=False))
    with log.writer("a", 0) as writer:
        writer.write(5, {"loss": 1.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"run": "a", "st')
    with log.writer("a", 5) as writer:
        writer.write(10, {"loss": 1.0})
    assert [record["step"] for record in log.records()] == [5, 10]
