"""Checks of options, so that errors name a wrong option before any computation."""

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from merge_jax.paths import flatten, near_misses, some_of, tied_paths

if TYPE_CHECKING:
    import jax

__all__ = [
    "all_finite",
    "check_above_zero",
    "check_apply",
    "check_arrays",
    "check_at_least_one",
    "check_below_one",
    "check_choice",
    "check_entries",
    "check_finite",
    "check_flag",
    "check_float_dtype",
    "check_key",
    "check_learnable",
    "check_number_or_schedule",
    "check_numbers",
    "check_zero_or_more",
    "count_examples",
    "error_context",
    "name_misfit",
    "name_missing_collections",
    "what_to_give",
]


@contextlib.contextmanager
def error_context(text: str) -> Iterator[None]:
    """Prefixes the message of a ValueError with the context."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from None


def check_at_least_one(**options: Any) -> None:
    """Raises ValueError unless every option is a whole number of at least 1."""
    for name, value in options.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_above_zero(**options: Any) -> None:
    """Raises ValueError unless every option is a finite number above 0."""
    for name, value in options.items():
        if not 0 < _number(value) < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def check_zero_or_more(**options: Any) -> None:
    """Raises ValueError unless every option is a finite number of at least 0."""
    for name, value in options.items():
        if not 0 <= _number(value) < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def _number(value: Any) -> float:
    """Returns a number as a float; NaN for what is not one, such as a text, a flag, an array or a traced value."""
    try:
        return math.nan if isinstance(value, (str, bytes, bool)) or getattr(value, "ndim", 0) else float(value)
    except (TypeError, ValueError):
        return math.nan


def check_below_one(**options: float) -> None:
    """Raises ValueError unless every option is a rate in [0, 1)."""
    for name, rate in options.items():
        if not isinstance(rate, Real) or isinstance(rate, bool) or not 0 <= rate < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {rate!r}")


def check_entries(batch: Mapping[str, Any], *names: str, hint: str = "") -> None:
    """Raises ValueError unless a batch has all these entries; the message lists near misses and ends with the hint."""
    for name in names:
        if name not in batch:
            raise ValueError(f"the batch has no {name!r}; {near_misses(name, batch)}{hint}")


def count_examples(arrays: Mapping[str, Any], *names: str) -> int:
    """Returns the number of examples of all, or the named, entries; raises ValueError if their numbers differ."""
    check_entries(arrays, *names)
    lengths = {name: len(arrays[name]) for name in names or arrays}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"all entries must have the same number of examples, got {lengths}")
    return next(iter(lengths.values()))


def check_flag(**options: Any) -> None:
    """Raises ValueError unless every option is True or False."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def check_choice(noun: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError unless the value is one of the choices; the message lists near misses."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"unknown {noun} {value!r}; {near_misses(str(value), choices)}")


def check_number_or_schedule(**options: Any) -> None:
    """Raises ValueError unless every option is a finite number or a function of the step."""
    for name, value in options.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number and not callable(value):
            raise ValueError(f"{name} must be a finite number or a schedule of the step, got {value!r}")


def check_key(key: Any) -> None:
    """Raises ValueError unless it is one of JAX's random keys, of the new or the old kind."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    found = repr(key)
    if isinstance(key, (jax.Array, np.ndarray)):
        if key.shape == () and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return
        if key.shape in ((2,), (4,)) and key.dtype == np.uint32:  # Of `jax.random.PRNGKey`: threefry's and rbg's.
            return
        found = f"an array of {key.dtype}{list(key.shape)}"
    raise ValueError(f"the key must be one of JAX's, such as jax.random.key(0), got {found}")


def check_float_dtype(dtype: Any) -> None:
    """Raises ValueError unless the dtype is supported for computation."""
    import jax.numpy as jnp  # The other checks are for options, which are read before JAX is imported.

    try:
        is_float = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_float = False
    if not is_float:
        raise ValueError(f"dtype must be a float type, such as jnp.bfloat16, got {dtype!r}")


def check_arrays(role: str, tree: Any, *, numbers: bool = True) -> None:
    """Raises ValueError for a leaf that is not an array, e.g. a function or Keras variable; `numbers` may pass."""
    import jax
    import numpy as np

    accepted: tuple[type, ...] = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    if numbers:
        accepted += (bool, int, float, complex)
    for path, leaf in flatten(tree).items():
        if not isinstance(leaf, accepted):
            name = f"leaf {path!r}" if path else "tree"
            raise ValueError(f"the {role} {name} must be an array, got {type(leaf).__name__}: {what_to_give(leaf)}")


def what_to_give(leaf: Any) -> str:
    """Returns the end of an error message: what to pass instead of a leaf that is not a JAX or NumPy array."""
    if type(leaf).__module__.partition(".")[0] == "keras":
        return "give the arrays of the Keras model, {v.path: v.value for v in model.trainable_variables}"
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return "give its numbers (jnp.asarray)"
    return "give arrays alone; of an Equinox module, params, static = eqx.partition(module, eqx.is_inexact_array)"


def check_numbers(name: str, array: Any) -> None:
    """Raises ValueError for texts or objects, such as the names of classes, where an array of numbers is expected."""
    import numpy as np

    if not hasattr(array, "dtype"):
        try:
            array = np.asarray(array)
        except ValueError as error:  # Rows of unequal lengths.
            raise ValueError(f"{name} must be an array of numbers ({error})") from None
    if getattr(array.dtype, "kind", "f") in "OSU":  # PyTorch's types have no kind.
        found = f"an array of {array.dtype}" if np.ndim(array) else type(array.item()).__name__
        raise ValueError(f"{name} must be numbers, got {found}")


@contextlib.contextmanager
def name_missing_collections(given: Iterable[str], role: str | None = None) -> Iterator[None]:
    """Replaces Flax's errors for a missing collection with a ValueError that names those that were given.

    Args:
      given: the names of the given collections.
      role: of the model whose state is given to `init_joint_state`; None for a model given as all its variables.
    """
    from flax.errors import ApplyScopeInvalidVariablesTypeError, ScopeCollectionNotFound

    try:
        yield
    except (ScopeCollectionNotFound, ApplyScopeInvalidVariablesTypeError) as error:
        names = some_of(list(map(repr, sorted(given))), 3) or "nothing"
        whole = '{"params": ..., "batch_stats": ...}' if role is None else f'{role}_state={{"batch_stats": ...}}'
        raise ValueError(
            f"the model reads a collection that it was not given: give all that model.init made, such as {whole}, "
            f"got {names} ({error})"
        ) from None


@contextlib.contextmanager
def name_misfit(inputs: Iterable[Any]) -> Iterator[None]:
    """Replaces Flax's errors for parameters of other shapes or names with a ValueError that has the inputs' shapes."""
    import numpy as np
    from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

    try:
        yield
    except (ScopeParamNotFoundError, ScopeParamShapeError) as error:
        shapes = [list(np.shape(one)) for one in inputs]
        raise ValueError(f"the variables do not fit the model and inputs of {shapes} ({error})") from None


def check_apply(**functions: Any) -> None:
    """Raises ValueError for a Linen module where its `apply` is expected, or what is no function."""
    import flax.linen as nn

    for name, function in functions.items():
        if isinstance(function, nn.Module):
            raise ValueError(
                f"{name} must be a function of variables and inputs: give model.apply, not the "
                f"{type(function).__name__} itself"
            )
        if not callable(function):
            raise ValueError(f"{name} must be a function, such as model.apply, got {type(function).__name__}")


def check_learnable(role: str, params: Any) -> None:
    """Raises ValueError for a leaf of a trained model that has no gradient, such as a random key.

    Warns:
      UserWarning: a matrix appears at two paths, and would be trained as two.
    """
    import jax.numpy as jnp

    check_arrays(role, params, numbers=False)
    for tied in tied_paths(params):
        warnings.warn(
            f"the {role} leaves {tied[0]!r} and {tied[1]!r} are one array, but will be trained as two and diverge: "
            "keep it at one path of the tree and read it twice in the model",
            stacklevel=3,
        )
    for path, leaf in flatten(params).items():
        if not jnp.issubdtype(dtype := leaf.dtype, jnp.inexact):
            raise ValueError(
                f"the {role} leaf {path!r} must be an array of floats, since it is trained, got {dtype}"
                f"{list(leaf.shape)}: keep it apart, in the model state or in the loss function; of an NNX module,"
                " graph, params, rest = nnx.split(module, nnx.Param, ...)"
            )


def all_finite(*trees: Any) -> "jax.Array":
    """Returns whether all numbers of all leaves are finite, as a boolean scalar."""
    import jax
    import jax.numpy as jnp

    leaves = [leaf for leaf in jax.tree.leaves(trees) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    flags = jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves] or [True])
    # The minimum by a sort, which XLA does not fuse. It would repeat a reduction in each of the n leaves that are kept
    # or not, and n^2 operations take minutes to compile.
    return jnp.sort(flags)[0]


def check_finite(name: str, tree: Any) -> None:
    """Raises ValueError unless all numbers of all leaves are finite; the message lists the leaves that are not."""
    wrong = [path for path, leaf in flatten(tree).items() if not all_finite(leaf)]
    if wrong:
        raise ValueError(f"{name} has numbers that are not finite in {some_of(wrong, 3)}")
