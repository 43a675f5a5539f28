"""Options checked against the types that they are declared with, for configs that no command line has parsed."""

import math
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from merge_jax.checks import check_choice

__all__ = ["check_option_types"]


def check_option_types(options: Any, prefix: str = "") -> None:
    """Raises ValueError unless every field of a dataclass is of its declared type, and every number finite.

    Known are the types that options have: numbers, strings, paths, None, literals, tuples of one type, unions of these,
    and dataclasses of such fields. A whole number will do for a float; True and False are no numbers.
    """
    for field, kind in get_type_hints(type(options)).items():
        name, value = f"{prefix}{field}", getattr(options, field)
        if is_dataclass(value) and type(value) is kind:
            check_option_types(value, f"{name}.")
        elif not _is_of(value, kind):
            if isinstance(value, str) and (choices := _choices(kind)):
                check_choice(name, value, choices)
            raise ValueError(f"{name} must be {_text(kind)}, got {value!r}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(one, get_args(kind)[0]) for one in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _choices(kind: Any) -> list[str]:
    """Returns the strings that literals in a type allow."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [choice for one in get_args(kind) for choice in _choices(one)] if get_origin(kind) is not tuple else []


def _text(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_text(one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return f"a tuple of {_text(get_args(kind)[0])}"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", type(None): "None"}
    return names.get(kind, f"a {kind.__name__}")
