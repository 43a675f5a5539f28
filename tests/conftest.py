import itertools
import os

# Tests compile far more than they compute: without LLVM's optimisations they take two thirds of the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest
from hypothesis import settings

# The first case of a shape compiles, so a deadline for each case would be one for the compiler.
settings.register_profile("quick", max_examples=50, deadline=None)
settings.register_profile("thousand", max_examples=1000, deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def _strict_ranks():
    """Every test runs with implicit broadcasts between ranks refused, as a strict user's program may be.

    (Implicit casts between dtypes stay: Optax's Adam relies on them.)
    """
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def next_key():
    """A function that never returns the same key twice."""
    counter = itertools.count()
    return lambda: jax.random.fold_in(jax.random.key(0), next(counter))
