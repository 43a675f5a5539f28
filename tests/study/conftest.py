"""What the tests of studies are handed."""

import pytest


@pytest.fixture
def untraced(monkeypatch):
    """Leaves out the tracing, which takes the seconds of a check."""
    monkeypatch.setattr("merge_jax.study.grids.runner.check_run", lambda scenario, config: None)
