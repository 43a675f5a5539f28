"""What options that are paths hold: the same wherever it lies, another where it is another."""

import json
import shutil
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
import pytest

from merge_jax.checkpoints.orbax import Checkpoints
from merge_jax.study.config import RunConfig
from merge_jax.study.contents import _file_parts, contents_of, current_options, extended_options, run_identity
from merge_jax.study.options import TransferOptions


def content(path, **options):
    return contents_of({"seeds": 1, "first_seed": 0, "source": "frozen", "weights": path, **options})["weights"]


def change(path, at, to=b"!"):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(to)


@pytest.mark.parametrize("size", [0, 10, 2**20 - 1])
def test_a_file_is_known_by_all_of_it(size, tmp_path):
    file, copy = tmp_path / "a", tmp_path / "elsewhere"
    file.write_bytes(np.random.default_rng(0).bytes(size))
    shutil.copyfile(file, copy)
    assert content(file) == content(copy)
    if size:
        for at in (0, size // 2, size - 1):
            shutil.copyfile(file, copy)
            change(copy, at)
            assert content(copy) != content(file)
    copy.write_bytes(file.read_bytes() + b"!")
    assert content(copy) != content(file)


def test_a_large_file_is_known_by_its_size_and_blocks_up_to_its_end(tmp_path):
    file, copy = tmp_path / "a", tmp_path / "b"
    for path in (file, copy):
        with path.open("wb") as opened:
            opened.truncate(2**35)  # 32 GiB that take no room.
    expected = content(file)
    assert content(copy) == expected
    assert sum(map(len, _file_parts(file))) < 2**20 + 100
    for at in (0, 2**35 - 1):
        change(copy, at)
        assert content(copy) != expected
        change(copy, at, to=b"\0")
    with copy.open("r+b") as opened:
        opened.truncate(2**35 + 1)
    assert content(copy) != expected


def test_a_folder_is_known_by_the_names_and_sizes_of_its_files_and_what_is_in_them(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "weights").write_bytes(b"123")
    expected = content(folder)
    copied = shutil.copytree(folder, tmp_path / "elsewhere" / "other name")
    (copied / ".cache").mkdir()
    (copied / ".cache" / "x").write_text("hidden")
    assert content(copied) == expected
    (copied / "sub" / "weights").write_bytes(b"124")
    assert content(copied) != expected
    (copied / "sub" / "weights").write_bytes(b"123")
    (copied / "config.json").rename(copied / "config2.json")
    assert content(copied) != expected


def save(folder, value, step=3, seed=0):
    with Checkpoints(folder / "checkpoints" / f"source-seed{seed}", keep=None) as checkpoints:
        state = {"target": {"params": {"w": jnp.full(3, value)}, "model_state": {}}, "step": jnp.int32(step)}
        checkpoints.save(step, state)


def test_a_run_is_known_by_the_numbers_of_its_source(tmp_path):
    run = tmp_path / "run"
    save(run, 1.0)
    (run / "metrics.jsonl").write_text("")
    expected = content(run)
    copied = shutil.copytree(run, tmp_path / "copied")
    (copied / "metrics.jsonl").write_text("more")
    assert content(copied) == expected
    save(tmp_path / "again", 1.0)
    save(tmp_path / "other", 2.0)
    assert content(tmp_path / "again") == expected != content(tmp_path / "other")
    save(copied, 2.0, step=4)
    assert content(copied) != expected
    (run / "vocabulary.json").write_text("[]")
    assert content(run) != expected


def test_of_a_trajectory_every_step_counts(tmp_path):
    for name, first in (("a", 1.0), ("b", 5.0)):
        save(tmp_path / name, first)
        save(tmp_path / name, 2.0, step=4)
    a, b = tmp_path / "a", tmp_path / "b"
    assert content(a) == content(b)  # The last is all that a frozen source is.
    assert content(a, source="trajectory") != content(b, source="trajectory")


def test_what_is_no_path_of_anything_has_no_content_and_a_place_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.csv").write_text("a,b\n")
    options = {"source_from": tmp_path / "absent", "data": "digits", "routes": ("a/b=c/d",), "text": "./absent"}
    assert contents_of(options) == {}
    (tmp_path / "digits").mkdir()  # A set's name, and not a path.
    found = contents_of({**options, "test_data": "texts.csv", "data_dir": tmp_path})
    assert found.keys() == {"test_data", "data_dir"}
    (tmp_path / "more").write_text("of another set")
    assert contents_of({**options, "test_data": "texts.csv", "data_dir": tmp_path}) == found


def test_a_config_is_known_by_options_and_contents(tmp_path):
    save(tmp_path / "run", 1.0)
    config = RunConfig(seeds=1, source="frozen", source_from=tmp_path / "run", run_dir=tmp_path)
    identity = run_identity(config)
    assert identity["source_from"] == str(tmp_path / "run")
    assert identity["contents"] == {"source_from": content(tmp_path / "run")}
    assert "run_dir" not in identity
    assert "contents" not in run_identity(RunConfig())


@dataclass(frozen=True, kw_only=True)
class Config(TransferOptions, RunConfig):
    pass


def test_a_run_from_before_an_option_was_there_has_what_was_done_then():
    now = json.loads(json.dumps(run_identity(Config())))
    new = {"first_seed", "routes", "unlabelled", "head_first", "head_floor", "target_rate"}
    assert current_options({name: value for name, value in now.items() if name not in new}) == now


def test_a_resumed_run_may_add_seeds_and_methods(tmp_path):
    save(tmp_path / "run", 1.0)
    save(tmp_path / "run", 2.0, seed=1)

    @dataclass(frozen=True, kw_only=True)
    class Config(RunConfig):
        methods: tuple[str, ...] = ("vanilla", "refit")

    config = Config(seeds=1, source="frozen", source_from=tmp_path / "run")
    saved = json.loads(json.dumps(run_identity(config)))
    more = replace(config, seeds=2, methods=("kd", "vanilla", "refit"))
    now = json.loads(json.dumps(run_identity(more)))
    assert now["contents"] != saved["contents"]  # Of two sources.
    assert extended_options(saved, more) == now
    assert extended_options(now, config) == now  # Fewer are another run.
    assert extended_options(saved, replace(more, first_seed=1))["first_seed"] == 0  # So are others.
    of_second = run_identity(replace(config, first_seed=1))
    assert len({str(each["contents"]) for each in (saved, now, of_second)}) == 3
    save(tmp_path / "run", 3.0, step=4)
    assert extended_options(saved, more) == {**now, "contents": saved["contents"]}  # Another source does too.
