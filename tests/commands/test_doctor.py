"""The doctor: it finds a machine ready, and names what is bad."""

import importlib.metadata
import importlib.util
import shutil

import jax
import pytest

from merge_jax.commands import doctor, main


def test_the_doctor_finds_this_machine_ready(monkeypatch, capsys):
    # A full disk is no fault of the installation, which this test is about.
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 1, 2**39))
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    printed = capsys.readouterr().out
    assert end.value.code == 0, printed
    assert "ready" in printed.splitlines()[-1]
    assert f"ok    jax {importlib.metadata.version('jax')}" in printed


def test_the_doctor_names_what_is_bad(monkeypatch, capsys):
    version = importlib.metadata.version
    found = {"flax": "0.1.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found.get(name) or version(name))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 2**20))
    assert doctor.examine() == 1
    bad = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BAD")]
    assert len(bad) == 2
    assert "flax 0.1.0, needed is >=0.12.8" in bad[0]
    assert "free disk here: 0.0 GiB" in bad[1]


def test_the_doctor_knows_plugins_that_do_not_fit(monkeypatch):
    class Distribution:
        def __init__(self, name, version):
            self.metadata, self.version = {"Name": name}, version

    there = [Distribution(*one) for one in (("jax", "0.10.2"), ("jaxlib", "0.10.2"), ("jax-cuda12-plugin", "0.9.1"))]
    monkeypatch.setattr(
        importlib.metadata, "distributions", lambda: [*there, Distribution("jax_cuda13_pjrt", "0.10.1")]
    )
    texts = [finding.text for finding in doctor._plugins()]
    assert texts[0].startswith("jax-cuda12-plugin 0.9.1 beside jax 0.10.2")
    assert texts[1].startswith("plugins of cuda12 and cuda13 are both installed")


@pytest.mark.parametrize(
    ("backend", "version", "flags", "warned"),
    [
        ("gpu", "0.11.2", "", True),
        ("gpu", "0.11.2", "--xla_gpu_enable_triton_gemm=false", False),
        ("gpu", "0.12.0.1", "", False),
        ("cpu", "0.11.2", "", False),
    ],
)
def test_the_doctor_knows_which_jax_aborts_on_a_gpu(backend, version, flags, warned, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "__version__", version)
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert any("openxla/xla#47381" in finding.text for finding in doctor._devices()) is warned


def test_the_doctor_computes_what_one_jax_gets_wrong(monkeypatch):
    monkeypatch.setattr(jax, "jit", lambda function: lambda rows: function(rows).at[32_768:].set(0))
    (found,) = doctor._rows()
    assert found.kind == "note"
    assert "from row 32768 on" in found.text
    monkeypatch.undo()
    if jax.__version__ != "0.10.2":  # That one may be right on other CPUs.
        assert not list(doctor._rows())


def test_a_missing_package_is_to_be_installed(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["absent_thing>=2", "another; extra == 'docs'"])
    assert [tuple(finding) for finding in doctor._packages()] == [
        ("bad", "absent_thing is missing: pip install 'absent_thing>=2'")
    ]
