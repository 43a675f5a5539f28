"""Routes between models of unlike depth: layers are paired in proportion."""

import re
from collections.abc import Mapping
from typing import get_args

from merge_jax.checks import check_choice
from merge_jax.paths import Pattern, find_paths, flatten, natural_order, near_misses
from merge_jax.transfers.pairing import named_units, survey
from merge_jax.transfers.routes import Route, Unmatched, check_view
from merge_jax.transfers.views import ATTENTION_KERNELS, ViewName, proportional
from merge_jax.types import Params

__all__ = ["Matches", "match"]


class Matches(dict[str, str]):
    """Routes `{target path: source path}` found by `match`.

    Attributes:
      left_out: target paths that match a pattern but have no route, with the reason.
    """

    left_out: Mapping[str, str]

    def __init__(self, routes: Mapping[str, str], left_out: Mapping[str, str]) -> None:  # noqa: D107
        super().__init__(routes)
        self.left_out = dict(left_out)


def match(
    source_params: Params,
    target_params: Params,
    *,
    source: Pattern,
    target: Pattern,
    view: ViewName = "matrix",
    unmatched: Unmatched = "error",
) -> Matches:
    """Returns routes `{target path: source path}` between layers of models of different depth, in proportion.

    Layers are in natural order of their paths. Target layer `i` of `n` is paired with source layer `floor((i + 1/2) m /
    n)` of `m`. So six layers are paired with every second one of twelve, and twelve layers share six. If a layer has
    several leaves, they are paired by kind: two leaves are of one kind if their paths agree after the last part that
    contains a number (`attention/query/kernel` of `encoder/layer_3/attention/query/kernel`). If both models have only
    one kind, its name does not matter.

    In the view `attention` the patterns name blocks instead of leaves.

    With `unmatched="skip"`, leaves that cannot be paired get no route: kinds that the source lacks, scalars, integers,
    unknown layouts, and embeddings with different numbers of rows. `.left_out` of the result lists them with reasons.

    >>> import jax.numpy as jnp
    >>> layers = lambda n: {f"layer_{i}": {"kernel": jnp.ones((2, 2))} for i in range(n)}
    >>> match(layers(4), layers(2), source="*/kernel", target="*/kernel")
    {'layer_0/kernel': 'layer_1/kernel', 'layer_1/kernel': 'layer_3/kernel'}

    Raises:
      ValueError: a pattern that matches nothing; kinds of target leaves that the source lacks, unless they are skipped
        and others remain.
    """
    check_view(view)
    check_choice("way with unmatched leaves", unmatched, get_args(Unmatched))

    def by_kind(role: str, params: Params, pattern: Pattern) -> dict[str, list[str]]:
        leaves = flatten(params)
        if view == "attention":
            suffix = f"/{ATTENTION_KERNELS[0]}/kernel"
            paths = [unit[0].removesuffix(suffix) for unit in named_units(role, leaves, pattern, view)]
        else:
            paths = find_paths(leaves, pattern, role=role)
        found: dict[str, list[str]] = {}
        for path in sorted(paths, key=natural_order):
            parts = path.split("/")
            last = max((i for i, part in enumerate(parts) if re.search("[0-9]", part)), default=-1)
            found.setdefault("/".join(parts[last + 1 :]), []).append(path)
        return found

    sources = by_kind("source", source_params, source)
    targets = by_kind("target", target_params, target)
    if len(sources) == len(targets) == 1:
        sources = dict(zip(targets, sources.values(), strict=True))
    missing = [kind for kind in targets if kind not in sources]
    if missing and (unmatched == "error" or len(missing) == len(targets)):
        kinds = f"kind {missing[0]!r}" if len(missing) == 1 else f"kinds {', '.join(map(repr, missing))}"
        raise ValueError(
            f"the target has leaves of the {kinds}, the source has none: {near_misses(missing[0], sources)}. "
            "Where kinds have other names, match them one at a time; unmatched='skip' leaves them out"
        )
    routes: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for kind, paths in targets.items():
        if kind in missing:
            left_out |= dict.fromkeys(paths, f"the source has no leaves of the kind {kind!r}")
            continue
        partners = proportional(len(paths), len(sources[kind]))
        routes.update({path: sources[kind][i] for path, i in zip(paths, partners, strict=True)})
    if unmatched == "skip":
        pairs = [Route(path, partner, view=view, unmatched="skip") for path, partner in routes.items()]
        for one in survey(pairs, source_params, target_params)[1]:
            path = str(one.route.target)
            left_out[path] = one.reason
            del routes[path]
    return Matches(dict(sorted(routes.items(), key=lambda item: natural_order(item[0]))), left_out)
