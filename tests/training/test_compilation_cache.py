"""The cache of compiled programs: where it is, what is kept, and what is told where it cannot be."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import cross_structure
from merge_jax.commands import doctor
from merge_jax.study.cli import main, parse
from merge_jax.study.contents import run_identity
from merge_jax.study.grids.queue import Job
from merge_jax.training import compilation_cache

_COMPILES = """
import json, sys
from pathlib import Path
from merge_jax.training.compilation_cache import programs_read, use_cache
choice = sys.argv[1]
use_cache(choice if choice in ("default", "none") else Path(choice))
import jax
jax.jit(lambda x: jax.numpy.sin(x @ x.T).sum())(jax.numpy.ones((8, 8))).block_until_ready()
config = {name: getattr(jax.config, name) for name in (
    "jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs")}
print(json.dumps([*config.values(), programs_read()]))
"""
_KEEP_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def compiled(choice, home, **environment):
    """Compiles in a process of its own; the folder, its bound, the least seconds, programs read, and what was said."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPIL", "JAX_PERSIST"))}
    kept |= {"XDG_CACHE_HOME": str(home), "HOME": str(home)}
    words = [sys.executable, "-W", "error", "-c", _COMPILES, str(choice)]
    done = subprocess.run(words, env={**kept, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder, bound, least, reads = json.loads(done.stdout)
    return SimpleNamespace(folder=folder, bound=bound, least=least, reads=reads, said=done.stderr)


def programs(folder):
    return list(Path(folder).rglob("*-cache"))


@pytest.mark.skipif(sys.platform != "linux", reason="the user's cache folder is elsewhere")
def test_a_second_process_reads_what_a_first_has_compiled(tmp_path):
    first = compiled("default", tmp_path, **_KEEP_ALL)
    assert Path(first.folder) == tmp_path / "merge_jax" / "compiled"
    assert first.bound == compilation_cache.MAX_BYTES
    assert first.reads == 0
    assert programs(first.folder)
    assert Path(first.folder).stat().st_mode & 0o077 == 0
    second = compiled("default", tmp_path, **_KEEP_ALL)
    assert second.reads == len(programs(first.folder))
    assert second.said == ""


@pytest.mark.slow
def test_what_is_named_comes_before_the_environment_and_that_before_the_default(tmp_path):
    home, given, named = (tmp_path / name for name in ("home", "environment", "named"))
    environment = {**_KEEP_ALL, "JAX_COMPILATION_CACHE_DIR": str(given)}
    found = compiled("default", home, **environment)
    assert (found.folder, found.bound) == (str(given), -1)
    assert programs(given)
    found = compiled(named, home, **environment)
    assert (found.folder, found.bound) == (str(named), compilation_cache.MAX_BYTES)
    assert programs(named)
    before = len(programs(given))
    found = compiled("none", home, **environment)
    assert (found.folder, found.reads) == (None, 0)
    assert len(programs(given)) == before
    assert not home.exists()


@pytest.mark.slow
def test_the_environment_sets_what_is_kept_and_how_much(tmp_path):
    found = compiled("default", tmp_path)
    assert 0 < found.least < 1
    environment = {"JAX_COMPILATION_CACHE_MAX_SIZE": "1000", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7"}
    found = compiled("default", tmp_path, **environment)
    assert (found.bound, found.least) == (1000, 7)
    home = tmp_path / "off"
    assert compiled("default", home, JAX_ENABLE_COMPILATION_CACHE="false", **_KEEP_ALL).folder is None
    assert not home.exists()


def test_a_program_without_a_stamp_does_not_end_the_writing(tmp_path):
    # A process leaves one that is killed between the two, and so does a cache without a bound. JAX then writes no more.
    (tmp_path / "left-cache").write_bytes(b"half a program")
    found = compiled(tmp_path, tmp_path, **_KEEP_ALL)
    assert found.said == ""
    assert len(programs(tmp_path)) > 1


def test_a_folder_that_cannot_be_written_is_refused_where_it_was_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match=r"the compilation cache .*/file/cache cannot be written: .*, or none$"):
        compilation_cache.use_cache(file / "cache")
    found = compiled("default", file, **_KEEP_ALL)
    assert found.folder is None
    assert found.said.startswith("warning: the compilation cache")
    assert found.said.endswith("nothing compiled is kept\n")
    assert found.said.count("\n") == 1


def test_a_wrong_folder_is_one_line_of_an_experiment(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(SystemExit) as end:
        main(cross_structure.PRESETS, "m", "", cross_structure.build, ["smoke", "--compilation-cache", str(file)])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: the compilation cache {file} cannot be written")


def test_the_cache_is_no_part_of_what_a_run_is():
    def parsed(*words):
        return parse(cross_structure.PRESETS, "m", "", ["smoke", *words])

    configs = [parsed(), parsed("--compilation-cache", "none"), parsed("--compilation-cache", "a/folder")]
    assert [config.compilation_cache for config in configs] == ["default", "none", Path("a/folder")]
    for config in configs:
        config.check()
        assert run_identity(config) == run_identity(configs[0])
    with pytest.raises(ValueError, match=r"compilation_cache must be .*, got 'nonne'"):
        replace(configs[0], compilation_cache="nonne").check()


@pytest.mark.parametrize(
    ("choice", "options"), [("default", []), ("none", ["--compilation-cache", "none"])], ids=["default", "none"]
)
def test_the_processes_of_a_study_have_its_cache(choice, options, tmp_path):
    config = SimpleNamespace(compilation_cache=choice, run_dir=tmp_path)
    run = SimpleNamespace(setting=SimpleNamespace(experiment="tests.tiny"))
    one = Job(run, config, config, ("smoke",), None)
    assert one.command(None).words == ("smoke", *options)
    assert one.words == ["python", "-m", "tests.tiny", "smoke"]


def test_the_doctor_tries_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    (tmp_path / "program").write_bytes(bytes(3 * 2**20))
    where, tried = doctor._cache()
    assert where.text == f"compilation cache: in {tmp_path}, 3.0 MiB"
    assert tried.kind == "good"
    assert tried.text.startswith("compilation cache: read")
    assert len(list(tmp_path.iterdir())) == 1


_REFUSED = (
    "E0612 cpu_aot_loader.cc:195] Loading XLA:CPU AOT result. Target machine feature +prefer-no-gather is not "
    "supported on the host machine. Machine type used for XLA:CPU compilation doesn't match the machine type for "
    "execution.\n"
)


@pytest.mark.parametrize(
    ("kept", "read", "said", "kind", "message"),
    [
        (True, 1, "", "good", "compilation cache: read:"),
        (True, 0, _REFUSED, "note", "not read, because XLA says 'Target machine feature +prefer-no-gather is not supp"),
        (True, 0, _REFUSED, "note", "jax-ml/jax#38445"),
        (True, 1, _REFUSED, "note", "compilation cache: read, though XLA says"),
        (True, 0, "one line\nUserWarning: no zlib\n\n", "note", "not read, because UserWarning: no zlib; each run"),
        (True, 0, "", "note", "not read, because of something that JAX does not say"),
        (False, 0, "", "note", "not read, because nothing was written"),
    ],
)
def test_the_doctor_says_why_a_cache_is_not_read(kept, read, said, kind, message):
    finding = doctor._judged(kept, read, said)
    assert finding.kind == kind
    assert message in finding.text


def test_the_doctor_says_where_the_cache_could_not_be_tried(monkeypatch):
    monkeypatch.setattr(doctor, "_COMPILES", "raise RuntimeError('no device')")
    assert [finding.text for finding in doctor._cache()][1] == (
        "compilation cache: not tried, as compiling fails: RuntimeError: no device"
    )
