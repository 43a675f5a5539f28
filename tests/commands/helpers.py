"""Commands called in this process."""

import numpy as np
import pytest

import merge_jax as mj
from merge_jax.commands import main


def said(capsys, *words):
    """What a command prints; it must end well."""
    main(list(map(str, words)))
    return capsys.readouterr().out


def refused(capsys, *words):
    """The one line that a command refuses with."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, words)))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def assert_equal_leaves(found, expected):
    found, expected = mj.flatten(found), mj.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf)
