"""The walk of a refit: both computations, layer by layer, each solved from its current inputs."""

import functools
import math
import string
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from merge_jax.transfers.channels.program import Program
from merge_jax.transfers.fitted.batches import stacked
from merge_jax.transfers.fitted.plan import RefitPlan, Site
from merge_jax.transfers.fitted.solve import (
    add_moments,
    at_rows,
    batch_moments,
    end_rows,
    entering,
    matrix,
    no_moments,
    reaching,
    slope,
    solve,
    without,
    write,
)
from merge_jax.transfers.host_leaves import any_on_host, on_device

__all__ = ["FewRowsWarning", "Walk"]

_FEW_ROWS, _ROWS_OF_UNKNOWN = 4096, 200
_VIEWS = frozenset({"slice", "squeeze", "reshape", "transpose", "pad", "rev"})  # Free to recompute.


class FewRowsWarning(UserWarning):
    """A layer has more unknowns than rows, so its ridge was raised."""


@dataclass(frozen=True)
class Walk:
    """Both computations, site by site; only the values of all batches at one depth are kept."""

    source: Program
    target: Program
    plan: RefitPlan
    ridge: float
    max_rows: int
    axis_name: str | None
    batches: int
    num_inputs: int

    def run(
        self,
        matrix_of: Callable[[str], jax.Array],
        source_leaves: dict[int, jax.Array],
        leaves: dict[int, jax.Array],
        inputs: list[jax.Array],
        weights: jax.Array,
        key: jax.Array,
    ) -> dict[str, jax.Array]:
        """Replaces the target's `leaves` by solved ones, and returns how well each site was solved.

        So no leaf is held twice. `matrix_of` makes `A` of a pair.
        """
        source_values = dict(zip(self.source.inputs, inputs, strict=True))
        values = dict(zip(self.target.inputs, inputs, strict=True))
        source_kept, kept, solved = self._source_kept(), self._target_kept(), {}
        apart, after = any_on_host(source_leaves, leaves, inputs), jnp.zeros(())

        def read(wanted: Collection[int]) -> dict[int, jax.Array]:
            return {one: source_leaves[one] for one in self.source.leaves_for(source_values, wanted)}

        for number, site in enumerate(self.plan.sites):
            keys = jax.random.split(jax.random.fold_in(key, number), len(weights))
            step = functools.partial(self._step, site, source_kept[number], kept[number])
            wanted = {site.source_end, *source_kept[number]}
            for stop in self._stops(source_values.keys(), wanted) if apart else ():
                advance = jax.jit(functools.partial(self._advance, stop))
                source_values, after = advance(on_device(read(stop)), source_values, after)
                jax.block_until_ready(after)
            used = read(wanted)
            if apart:
                step, used = jax.jit(step), on_device(used)
            matrices = {axis.name: matrix_of(axis.name) for axis in site.pairs if axis.name is not None}
            written, r2, source_values, values, after = step(
                matrices, used, leaves, source_values, values, weights, keys, after
            )
            leaves.update(written)
            solved |= {one.layer.leaf: r2 for one in site.unknowns}
            if apart:
                jax.block_until_ready(after)
        return solved

    def _stops(self, known: Collection[int], wanted: set[int]) -> list[frozenset[int]]:
        """Returns the source's values to compute first, stop by stop, on the way from known to wanted ones.

        So a program reads leaves of at most the largest one's size, or those of one equation. A source that is deeper
        than the target computes several layers between two sites, which would all be on the device at once.
        """
        program, leaves = self.source, set(self.source.leaves.values())
        most = max(map(program.size, leaves), default=0)
        equations, stops, read, total = program.needed(known, wanted)[0], list[frozenset[int]](), set[int](), 0
        made = set(known)
        for place, equation in enumerate(equations):
            new = leaves.intersection(equation.reads) - read
            size = sum(map(program.size, new))
            if read and total + size > most:
                later = wanted.union(*(one.reads for one in equations[place:]))
                stops.append(frozenset(later & made & program.data))
                read, total = set(), 0
            read, total = read | new, total + size
            made.update(equation.outputs)
        return stops

    def _advance(
        self, stop: frozenset[int], leaves: dict[int, jax.Array], values: dict[int, jax.Array], after: jax.Array
    ) -> tuple[dict[int, jax.Array], jax.Array]:
        """Returns the source's values at a stop, of all batches."""

        def compute(count: jax.Array, batch: dict[int, jax.Array]) -> tuple[jax.Array, dict[int, jax.Array]]:
            found = self.source.evaluate({**leaves, **batch}, stop)
            return count + 1, {one: found[one] for one in stop - batch.keys()}

        count, made = stacked(compute, jnp.zeros(()), values, after)
        return {**{one: rows for one, rows in values.items() if one in stop}, **made}, count

    def _step(
        self,
        site: Site,
        source_kept: frozenset[int],
        kept: frozenset[int],
        matrices: Mapping[str, jax.Array],
        source_leaves: dict[int, jax.Array],
        leaves: dict[int, jax.Array],
        source_values: dict[int, jax.Array],
        values: dict[int, jax.Array],
        weights: jax.Array,
        keys: jax.Array,
        after: jax.Array,
    ) -> tuple[dict[int, jax.Array], jax.Array, dict[int, jax.Array], dict[int, jax.Array], jax.Array]:
        """Returns the leaves that a site writes, how well it was solved, and the kept values of both models."""
        unknowns = [(one, slope(self.target, site, one, leaves)) for one in site.unknowns]
        priors = [matrix(self.target, one, leaves) * (scale[None] if site.dense else 1) for one, scale in unknowns]
        gather = functools.partial(self._gather, site, matrices, source_leaves, leaves, source_kept, kept)
        # Known values that are needed again stay in place.
        known = [{one: rows for one, rows in of.items() if one in ones}
                 for of, ones in ((source_values, source_kept), (values, kept))]  # fmt: skip
        moments, made = stacked(gather, no_moments(site), (source_values, values, weights, keys), after)
        source_values, values = ({**old, **new} for old, new in zip(known, made, strict=True))
        reach = reaching(self.target, site, leaves, [scale for _, scale in unknowns])
        solution = solve(site, moments, jnp.concatenate(priors), reach, self._valid(site, matrices), self.ridge)
        new = write(self.target, site, leaves, solution, moments)
        written = {number: leaf for number, leaf in new.items() if leaf is not leaves[number]}
        return written, solution.r2, source_values, values, moments.weight

    def _gather(
        self,
        site: Site,
        matrices: Mapping[str, jax.Array],
        source_leaves: dict[int, jax.Array],
        leaves: dict[int, jax.Array],
        source_kept: frozenset[int],
        kept: frozenset[int],
        moments: Any,
        batch: Any,
    ) -> tuple[Any, Any]:
        """Adds one batch to the moments of a site, and returns the batch's values to keep for the next."""
        source_values, values, weights, key = batch
        found = self.source.evaluate({**source_leaves, **source_values}, {site.source_end, *source_kept})
        entered = {one for unknown in site.unknowns for one in unknown.layer.meets.reads if one in self.target.data}
        needed = entered if site.dense else set[int]()
        known = self.target.evaluate({**leaves, **values}, {*needed, *kept})
        limit = math.ceil(self._most_rows(site) / self.batches)
        rows = jnp.arange(site.rows) if site.rows <= limit else jax.random.randint(key, (limit,), 0, site.rows)
        chosen = None if site.rows <= limit else rows
        x = entering(self.target, site, known, leaves, chosen)
        source_end = found[site.source_end].reshape(site.source_shape)
        wanted = self._in_target(site, matrices, at_rows(source_end, site.channel_axes, chosen))
        rest = end_rows(self.target, site, without(self.target, site, known), chosen)
        of_rows = weights[rows // site.stride % len(weights)]
        total = (lambda one: one) if self.axis_name is None else functools.partial(lax.psum, axis_name=self.axis_name)
        moments = add_moments(moments, batch_moments(x, wanted - rest, wanted, of_rows, total))
        made = (source_kept - source_values.keys(), found), (kept - values.keys(), known)
        return moments, tuple({one: of[one] for one in ones} for ones, of in made)

    def _in_target(self, site: Site, matrices: Mapping[str, jax.Array], value: jax.Array) -> jax.Array:
        """Returns rows `[r, *channels]` of the source at the target's channels, `[r, m]`."""
        axes = string.ascii_lowercase[: len(site.pairs)]
        given, names, source_axes = [], [], ""
        for axis, letter in zip(site.pairs, axes, strict=True):
            if axis.name is None:
                source_axes += letter
                continue
            around = "" if axis.around is None else axes[axis.around]
            source_axes += letter.upper()
            given.append(matrices[axis.name])
            names.append(f"{around}{letter}{letter.upper()}")
        equation = f"{','.join([*names, f'...{source_axes}'])}->...{axes}"
        rows = jnp.einsum(equation, *given, value, precision=lax.Precision.HIGHEST)
        return rows.reshape(len(rows), -1)

    def _valid(self, site: Site, matrices: Mapping[str, jax.Array]) -> jax.Array:
        """Returns which channels of a site have a source channel, bool `[m]`."""
        valid = jnp.ones(site.channels, bool)
        for number, axis in enumerate(site.pairs):
            if axis.name is not None:
                chosen = jnp.any(matrices[axis.name] != 0, -1)
                places = [number] if axis.around is None else [axis.around, number]
                chosen = chosen if places == sorted(places) else chosen.T
                valid &= jnp.expand_dims(chosen, [i for i in range(valid.ndim) if i not in places])
        return valid.reshape(-1)

    def check_rows(self, size: int, devices: int) -> None:
        """Warns of sites with fewer rows than unknowns, given the number of inputs per batch, and of devices."""
        for site in self.plan.sites:
            rows = devices * min(self._most_rows(site), site.rows // size * self.num_inputs)
            if rows < site.num_unknowns:
                warnings.warn(
                    f"{site.name} has {site.num_unknowns} unknowns and {rows} rows to solve them from: the ridge is "
                    f"raised {site.num_unknowns / rows:.3g} times; give more inputs",
                    FewRowsWarning,
                    stacklevel=3,
                )

    def _most_rows(self, site: Site) -> int:
        """Returns the maximum number of rows; fewer suffice for channels with a few separate entries."""
        few = max(_FEW_ROWS, _ROWS_OF_UNKNOWN * site.num_unknowns)
        return self.max_rows if site.dense else min(self.max_rows, few)

    def _target_kept(self) -> list[frozenset[int]]:
        """Returns for each site the target's values that later sites need."""
        program, sites = self.target, self.plan.sites
        written = {path: number for number, site in enumerate(sites) for path in site.leaves}

        def level(value: int) -> int:
            return max((written[path] for path in program.leaves_of[value] if path in written), default=-1)

        levels = {value: level(value) for equation in program.equations for value in equation.outputs}
        found = []
        for number in range(len(sites)):
            needed = program.ancestors(site.end for site in sites[number:])
            kept = {
                value
                for equation in program.equations
                if needed.intersection(equation.outputs) and levels[equation.outputs[0]] >= number
                for value in equation.reads
                if value in program.data and levels.get(value, -1) < number
            }
            found.append(_without_views(program, kept))
        return found

    def _source_kept(self) -> list[frozenset[int]]:
        """Returns the same for the source: values computed by the end of a site and read after it."""
        program, ends = self.source, [site.source_end for site in self.plan.sites]
        found, reached = [], -1
        for number, end in enumerate(ends):
            reached, later = max(reached, program.makers[end]), ends[number + 1 :]
            needed = program.ancestors(later)
            kept = {
                value
                for place, equation in enumerate(program.equations)
                if place > reached and needed.intersection(equation.outputs)
                for value in equation.reads
            } | set(later)
            kept = {value for value in kept & program.data if program.makers.get(value, -1) <= reached}
            found.append(_without_views(program, kept))
        return found


def _without_views(program: Program, kept: set[int]) -> frozenset[int]:
    """Returns the values to keep. Slices of one value are replaced by it if they are larger in total.

    A depthwise convolution slices its input once for each tap of its window.
    """
    kept, changes = set(kept), True
    while changes:
        changes = False
        views: dict[int, set[int]] = {}
        for value in kept:
            place = program.makers.get(value)
            equation = None if place is None else program.equations[place]
            if equation is not None and equation.name in _VIEWS:
                (whole,) = (one for one in equation.reads if one in program.data)
                views.setdefault(whole, set()).add(value)
        for whole, cut in views.items():
            if whole in kept or sum(map(program.size, cut)) > program.size(whole):
                kept, changes = (kept - cut) | {whole}, True
    return frozenset(kept)
