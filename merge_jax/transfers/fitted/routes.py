"""Routes of a refit: those of parameters, and of their modules' running statistics."""

from collections.abc import Mapping
from dataclasses import replace as changed
from typing import Any

from merge_jax.paths import flatten
from merge_jax.transfers.alignment.plan import any_layout
from merge_jax.transfers.channels.layer_sites import is_state
from merge_jax.transfers.layerwise import kernel_routes
from merge_jax.transfers.pairing import resolve
from merge_jax.transfers.routes import Route, Routes
from merge_jax.types import Params

__all__ = ["routes_with_state"]

_PARAMS = "params"


def routes_with_state(routes: Routes, source: Params, target: Params) -> tuple[Route, ...]:
    """Returns routes of parameters as routes of whole variables, including the state of their modules.

    Raises:
      ValueError: as `resolve`, for these routes.
    """
    named = kernel_routes(routes)
    wrapped = [isinstance(tree, Mapping) and _PARAMS in tree for tree in (source, target)]
    if all(wrapped):
        of_state = _of_state(named, source, target)
        made = (*map(_below_params, named), *of_state)
    else:  # A bare tree has no state to pair.
        made = tuple(_below_params(route, *wrapped) for route in named) if any(wrapped) else named
    resolve(made, source, target, layout=any_layout)  # For its errors and warnings, before the models are traced.
    return made


def _of_state(named: tuple[Route, ...], source: Params, target: Params) -> list[Route]:
    paths = {"source": list(flatten(source)), "target": list(flatten(target))}
    state = {role: [path for path in own if is_state(path, own)] for role, own in paths.items()}
    found: dict[str, str] = {}
    for one in resolve(named, source[_PARAMS], target[_PARAMS], layout=any_layout):
        modules = [path.rpartition("/")[0] for path in (one.target[0], one.source[0])]
        for path in state["target"]:
            collection, _, rest = path.partition("/")
            module, _, leaf = rest.rpartition("/")
            other = f"{collection}/{modules[1]}/{leaf}"
            if module == modules[0] and other in state["source"]:
                found[path] = other
    return [Route(path, other) for path, other in found.items()]


def _below_params(route: Route, source: bool = True, target: bool = True) -> Route:
    def below(leaves: Any) -> Any:
        if isinstance(leaves, tuple):
            return tuple(map(below, leaves))
        if not isinstance(leaves, str):
            raise ValueError(f"the refit takes paths and globs, not the regular expression {leaves.pattern!r}")
        return leaves if leaves.startswith(f"{_PARAMS}/") else f"{_PARAMS}/{leaves}"

    return changed(
        route,
        target=below(route.target) if target else route.target,
        source=below(route.source) if source else route.source,
    )
