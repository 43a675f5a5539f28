import contextlib
import gc
import itertools
import os
import signal
import time
from pathlib import Path

# Tests compile far more than they compute: without LLVM's optimisations they take two thirds of the time.
# Without the emitters of fusions that jaxlib 0.10 has by default, programs compile in three quarters of the time; later
# versions ignore the option.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)

# Many tests, and the programs that they start, compile the same: what one has compiled, all others read, and the next
# session too. Set here, in the process that starts those that run the tests; `pytest --cache-clear` empties it.
COMPILED = Path(__file__).parent.parent / ".pytest_cache" / "d" / "compiled"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Tracing makes millions of objects that live on: to look at them again and again took Python's collector a fifth of the
# time.
gc.set_threshold(100_000, 50, 1000)

# Who starts tests in the background may let them ignore these, and all processes that they start.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# ruff: noqa: E402
import jax
import pytest
from hypothesis import settings

# Its asserts say what they compare, as those of test files do.
pytest.register_assert_rewrite("tests.bad_input")

# The first case of a shape compiles, so a deadline for each case would be one for the compiler.
settings.register_profile("quick", max_examples=25, deadline=None)
settings.register_profile("thousand", max_examples=1000, deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_configure(config):
    """Removes what was compiled for code that is no more: what nothing has read for a week."""
    if not hasattr(config, "workerinput"):
        for file in COMPILED.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # Another session may be at it too.
                if file.stat().st_atime < time.time() - 7 * 24 * 3600:
                    file.unlink()


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One process more than cores: tests wait for the disk and for processes that they start."""
    return (yield) + 1


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
