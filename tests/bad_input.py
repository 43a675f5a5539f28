"""Calls with bad input, each refused by one line before anything is compiled and before the run folder is made."""

import re

import jax
import numpy as np
import pytest

from tests.smoke import run

# A model of one dense layer.
KERNEL = {"fc": {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)}}

# Calls: each is handed a folder of its own, and what reads the printed lines; it gives the line of the refusal.


def refused(experiment, *words):
    """The command line of an experiment: exit code 2, one line `error: ...` on standard error, and no run folder."""

    def call(folder, capsys):
        lines = _stopped(experiment, words, folder, capsys).err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert errors == lines[-1:]
        return errors[0].removeprefix("error: ")

    return call


def unparsed(experiment, *words):
    """The same, where the parser of options refuses: it prints a box, with near misses and help."""

    def call(folder, capsys):
        printed = _stopped(experiment, words, folder, capsys)
        return " ".join(re.sub(r"[─│╭╮╰╯]|-{3,}", " ", printed.out + printed.err).split())

    return call


def _stopped(experiment, words, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(experiment, folder / "run", *(str(word).replace("TMP", str(folder)) for word in words))
    assert stopped.value.code == 2
    assert not (folder / "run").exists()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed


def raises(function, kind=ValueError):
    """A function of the library, called with the folder."""

    def call(folder, capsys):
        del capsys
        with pytest.raises(kind) as error:
            function(folder)
        return str(error.value)

    return call


def on_file(name, content, load, kind=ValueError):
    """A function of a file."""

    def call(folder):
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        load(path)

    return raises(call, kind)


def refusals(rows):
    """Returns the test of rows `{id: (call, message)}`: this one line, TMP for the folder, and nothing is compiled."""

    @pytest.mark.parametrize(("call", "message"), rows.values(), ids=rows)
    def test(call, message, tmp_path, capsys, monkeypatch):
        def compiled(*_):
            raise AssertionError("compiled")

        monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
        line = call(tmp_path, capsys).replace(str(tmp_path), "TMP")
        assert "\n" not in line
        if isinstance(message, str):
            assert line == message
        else:
            assert message.fullmatch(line), line

    return test
