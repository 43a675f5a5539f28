"""`benchmarks.on_gpu` with fake parts, and for real with tiny networks on a CPU."""

import importlib.util
import json
import os
import time

import jax
import pytest

from benchmarks import on_gpu
from benchmarks.on_gpu import Config, Ledger, Part, Prepared, main, measure, parts_of

END = on_gpu._end


@pytest.fixture(autouse=True)
def _late_is_red(monkeypatch):
    """Where time is up in a test, the process ends with an error, not with 0 as in a benchmark."""
    monkeypatch.setattr(on_gpu, "_end", lambda ledger: os._exit(1))


class Scripted:
    """Takes the seconds a step that it was told, one after another."""

    def __init__(self, *seconds):
        self.left = iter(seconds)

    def __call__(self, steps):
        pass


@pytest.fixture
def _scripted(monkeypatch):
    monkeypatch.setattr(on_gpu, "_seconds", lambda run, steps: next(run.left))


def part(name, prepared, base=None, kind="ours"):
    def prepare():
        if isinstance(prepared, Exception):
            raise prepared
        return prepared

    return Part(name, kind, prepare, base)


def outcomes(tmp_path, parts, config, seconds_left=1000.0):
    ledger = Ledger(tmp_path / "of" / "parts.json", {"device": "none"}, [part.name for part in parts])
    measure(parts, config, ledger, time.monotonic() + seconds_left)
    content = json.loads((tmp_path / "of" / "parts.json").read_text())
    assert content == {"device": "none", "parts": ledger.outcomes}
    return ledger.outcomes


@pytest.mark.usefixtures("_scripted")
def test_a_ratio_is_the_median_of_those_of_neighbours(tmp_path):
    plain = Prepared(Scripted(1.0, 1.0, 1.0, 2.0, 4.0, 8.0), {"first_seconds": 9.0})
    joint = Prepared(Scripted(3.0, 4.0, 10.0, 0.5), {"first_seconds": 7.0}, epoch=True, peak=lambda: 3 * 2**20)
    config = Config(repetitions=3)
    of = outcomes(tmp_path, [part("plain", plain), part("joint", joint, "plain")], config)
    assert of["plain"] == {
        "outcome": "done",
        "milliseconds": 1000.0,
        "images_per_second": 128.0,
        "first_seconds": 9.0,
    }
    assert of["joint"] == {
        "outcome": "done",
        "milliseconds": 4000.0,
        "images_per_second": 32.0,
        "first_seconds": 7.0,
        "ratio": 1.25,  # Of 1.5, 1 and 1.25; that of the medians is 1.
        "epoch_seconds": 390 * 0.5,
        "peak_mib": 3.0,
    }


@pytest.mark.usefixtures("_scripted")
def test_what_fails_or_is_absent_keeps_nothing_else_off(tmp_path):
    parts = [
        part("large", RuntimeError("RESOURCE_EXHAUSTED: no memory\nmore of it")),
        part("absent", on_gpu._AbsentError("PyTorch is not installed")),
        part("small", Prepared(Scripted(0.1)), "large"),
    ]
    of = outcomes(tmp_path, parts, Config(repetitions=1))
    assert of["large"] == {"outcome": "failed: RuntimeError: RESOURCE_EXHAUSTED: no memory"}
    assert of["absent"] == {"outcome": "not run: PyTorch is not installed"}
    assert of["small"]["outcome"] == "done"
    assert "ratio" not in of["small"]


@pytest.mark.usefixtures("_scripted")
def test_what_does_not_fit_is_told_and_what_is_quicker_still_runs(tmp_path, capsys):
    parts = [part("slow", Prepared(Scripted(0.1))), part("quick", Prepared(Scripted(0.1)), kind="eager")]
    of = outcomes(tmp_path, parts, Config(repetitions=1), seconds_left=40.0)
    assert of["slow"]["outcome"].startswith("not run: ")
    assert of["slow"]["outcome"].endswith(" s are left, and it needs about 60")
    assert of["quick"]["outcome"] == "done"
    assert capsys.readouterr().out.startswith("slow: not run: ")


@pytest.mark.usefixtures("_scripted")
def test_what_a_kind_needs_is_learned_from_the_last_of_it(tmp_path):
    parts = [part("first", Prepared(Scripted(0.1))), part("second", Prepared(Scripted(0.1)))]
    on_time = time.monotonic

    class Clock:
        now = on_time()

        def __call__(self):
            Clock.now += 25.0  # Three looks a part: it takes 50 to 75 seconds.
            return Clock.now

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", Clock())
        of = outcomes(tmp_path, parts, Config(repetitions=1), seconds_left=150.0)
    assert of["first"]["outcome"] == "done"
    assert of["second"]["outcome"].endswith("it needs about 75")


def test_when_time_is_up_all_is_written(tmp_path, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    ledger = Ledger(tmp_path / "parts.json", {}, ["first", "second"])
    ledger.note("first", "done", milliseconds=12.34, ratio=1.5)
    END(ledger)
    assert codes == [0]
    assert json.loads((tmp_path / "parts.json").read_text())["parts"]["second"] == {"outcome": "not run"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["first: done: milliseconds 12.34, ratio 1.5", "time is up"]
    assert "| first | 12.3 | 1.50 |  |  |  |  |  |" in lines
    assert "| second | not run |  |  |  |  |  |  |" in lines


def test_bfloat16_comes_first_then_ours_before_those_in_pytorch_that_are_compared_with_it():
    parts = parts_of(Config(tiny=True))
    names = [part.name for part in parts]
    assert names[:3] == [f"bfloat16: {step}" for step in ("two plain steps", "joint, cycle 1", "joint, cycle 4")]
    assert len(set(names)) == len(names) == 15
    for i, one in enumerate(parts):
        assert one.base is None or one.base in names[:i]
        assert (one.kind == "ours") == ("torch" not in one.name)
        assert one.kind == "ours" or one.name.startswith(one.base or "")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: JAX found no GPU here, only ")
    assert line.endswith("; --tiny runs small networks on it")


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--repetitions", "0"], ["--minutes", "inf"]])
def test_options_out_of_range_are_one_line(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        main(["--tiny", *words])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: minutes must be above 0 and repetitions at least 1\n"


@pytest.mark.slow
def test_tiny_networks_run(tmp_path, monkeypatch, capsys):
    """Plain and joint in bfloat16, and one row of PyTorch or that it is absent."""
    all_parts = on_gpu.parts_of

    def some_parts(config):
        parts = all_parts(config)
        return [*parts[:2], next(part for part in parts if part.kind == "eager")]

    monkeypatch.setattr(on_gpu, "parts_of", some_parts)
    monkeypatch.chdir(tmp_path)
    main(["--tiny", "--repetitions", "1", "--minutes", "30"])
    parts = json.loads((tmp_path / "runs" / "benchmarks" / "on_gpu_tiny.json").read_text())["parts"]
    plain, joint, torch = parts.values()
    assert plain["outcome"] == joint["outcome"] == "done"
    assert {"milliseconds", "images_per_second", "first_seconds", "epoch_seconds"} <= plain.keys()
    assert joint["ratio"] > 0
    if importlib.util.find_spec("torch"):
        assert torch["outcome"] == "done"
    else:
        assert torch["outcome"] == 'not run: PyTorch is not installed: pip install -e ".[bench]"'
    assert "| bfloat16: joint, cycle 1 | " in capsys.readouterr().out
