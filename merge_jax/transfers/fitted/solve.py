"""One site of a refit: its inputs, their moments, the ridge regression, and the solved leaves."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from merge_jax.transfers.channels.program import Program
from merge_jax.transfers.fitted.plan import Site, Unknown

__all__ = [
    "Moments",
    "add_moments",
    "at_rows",
    "batch_moments",
    "channel_rows",
    "end_rows",
    "entering",
    "matrix",
    "no_moments",
    "reaching",
    "slope",
    "solve",
    "without",
    "write",
]

_PRECISION = lax.Precision.HIGHEST
_TINY = 1e-30

Values = Mapping[int, jax.Array]


class Moments(NamedTuple):
    """Weighted moments of rows: inputs `x`, regression targets `t`, and the source's channels `y`.

    `x` is `[r, d]` at a site that sums over channels, and `[r, m, d]` if each of the `m` channels has separate inputs;
    `t` and `y` are `[r, m]`. Second moments are sums of products of centred values.
    """

    weight: jax.Array
    means: tuple[jax.Array, jax.Array, jax.Array]
    xx: jax.Array
    xt: jax.Array
    tt: jax.Array
    yy: jax.Array


def no_moments(site: Site) -> Moments:
    """Returns the moments of zero rows."""
    d, m = site.num_unknowns, math.prod(site.channels)
    x, xx, xt = ((d,), (d, d), (d, m)) if site.dense else ((m, d), (m, d, d), (m, d))
    zeros = [jnp.zeros(shape) for shape in (x, (m,), (m,), xx, xt, (m,), (m,))]
    return Moments(jnp.zeros(()), (zeros[0], zeros[1], zeros[2]), *zeros[3:])


def batch_moments(
    x: jax.Array, t: jax.Array, y: jax.Array, weights: jax.Array, total: Callable[[jax.Array], jax.Array]
) -> Moments:
    """Returns the moments of rows with weights `[r]`; `total` sums over the devices that share them."""
    count = total(weights.sum())

    def mean(rows: jax.Array) -> jax.Array:
        return total(jnp.tensordot(weights, rows, 1, precision=_PRECISION)) / jnp.maximum(count, _TINY)

    means = mean(x), mean(t), mean(y)
    x, t, y = (
        jnp.sqrt(weights).reshape(-1, *(1,) * (rows.ndim - 1)) * (rows - centre[None])
        for rows, centre in zip((x, t, y), means, strict=True)
    )
    products = "rd,re->de", "rd,rm->dm"
    if x.ndim == 3:
        products = "rmd,rme->mde", "rmd,rm->md"
    xx, xt = (jnp.einsum(one, x, other, precision=_PRECISION) for one, other in zip(products, (x, t), strict=True))
    return Moments(count, means, total(xx), total(xt), total(jnp.square(t).sum(0)), total(jnp.square(y).sum(0)))


def add_moments(one: Moments, other: Moments) -> Moments:
    """Returns the moments of the rows of both (Chan et al., 1979: exact, without large sums that cancel)."""
    weight = one.weight + other.weight
    share = other.weight / jnp.maximum(weight, _TINY)
    x, t, y = (b - a for a, b in zip(one.means, other.means, strict=True))
    means = tuple(a + share * step for a, step in zip(one.means, (x, t, y), strict=True))
    outer = "d,e->de", "d,m->dm"
    if x.ndim == 2:
        outer = "md,me->mde", "md,m->md"
    xx, xt = (jnp.einsum(form, x, step, precision=_PRECISION) for form, step in zip(outer, (x, t), strict=True))
    both = one.weight * share
    return Moments(
        weight,
        (means[0], means[1], means[2]),
        one.xx + other.xx + both * xx,
        one.xt + other.xt + both * xt,
        one.tt + other.tt + both * t * t,
        one.yy + other.yy + both * y * y,
    )


def entering(program: Program, site: Site, values: Values, leaves: Values, rows: jax.Array | None) -> jax.Array:
    """Returns the factors of a site's unknowns, float32, as `x` in `Moments`, for these rows only."""
    if site.dense:
        return jnp.concatenate([_entering_dense(program, one, values, rows) for one in site.unknowns], axis=1)
    (unknown,) = site.unknowns
    number = program.leaves[unknown.layer.leaf]
    shape = program.shapes[number].shape
    sizes, order = [shape[axis] for axis in unknown.axes], [unknown.axes.index(axis) for axis in range(len(shape))]
    rest = without(program, site, {**values, **leaves})
    zero = end_rows(program, site, rest, rows)
    starts = _starts_by_tap(program, unknown, sizes, order)
    # If each entry of a channel is multiplied once: the end with this entry 1 and the others 0.
    met = [next(one for one in program.equations[program.makers[start]].reads if one in program.data)
           for start in starts]  # fmt: skip
    known, found = program.evaluate({**values, **leaves}, met), []
    for tap in range(unknown.inputs):
        if starts:
            given = {**rest, starts[tap]: known[met[tap]]}
        else:
            ones = jnp.zeros((unknown.inputs, math.prod(sizes) // unknown.inputs), program.shapes[number].dtype)
            given = {**values, **leaves, number: ones.at[tap].set(1).reshape(sizes).transpose(order)}
        found.append(end_rows(program, site, given, rows) - zero)
    return jnp.stack(found, axis=-1)


def _starts_by_tap(program: Program, unknown: Unknown, sizes: Sequence[int], order: Sequence[int]) -> list[int]:
    """Returns the products of a leaf with the data, one for each entry of a channel, in order; or none.

    A depthwise convolution that sums shifted products has this form.
    """
    number, found = program.leaves[unknown.layer.leaf], {}
    taps = np.arange(unknown.inputs, dtype=np.float32)
    leaf = np.repeat(taps, math.prod(sizes) // unknown.inputs).reshape(sizes).transpose(order)
    for start in unknown.layer.starts:
        equation = program.equations[program.makers[start]]
        operand = next((one for one in equation.reads if one not in program.data), None)
        if equation.name != "mul" or operand is None or program.leaves_of[operand] != {unknown.layer.leaf}:
            return []
        while operand != number and program.equations[program.makers[operand]].name == "broadcast_in_dim":
            (operand,) = program.equations[program.makers[operand]].reads
        with jax.ensure_compile_time_eval():
            read, ones = (
                np.asarray(program.evaluate({number: jnp.asarray(one)}, [operand])[operand])
                for one in (leaf, np.ones_like(leaf))
            )
        if np.all(ones == 1) and np.all(read == read.flat[0]):
            found[read.flat[0]] = start
    each_once = sorted(found) == list(taps) and len(unknown.layer.starts) == len(taps)
    return [found[tap] for tap in taps] if each_once else []


def _entering_dense(program: Program, unknown: Unknown, values: Values, rows: jax.Array | None) -> jax.Array:
    equation = unknown.layer.meets
    number = next(one for one in equation.reads if one in program.data)
    x = values[number].astype(jnp.float32)
    if equation.name == "dot_general":
        (left, right), _ = equation.params["dimension_numbers"]
        summed = left if equation.inputs[0] == number else right
        free = [axis for axis in range(x.ndim) if axis not in summed]
        flat = x.transpose(*free, *summed).reshape(-1, unknown.inputs)
        return flat if rows is None else flat[rows]
    params, numbers = equation.params, equation.params["dimension_numbers"]
    x = x.transpose(numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    between = params["lhs_dilation"] or (1,) * len(params["padding"])  # Above 1 in a transposed convolution.
    around = [(*one, step - 1) for one, step in zip(params["padding"], between, strict=True)]
    x = lax.pad(x, jnp.float32(0), [(0, 0, 0), *around, (0, 0, 0)])
    made = program.shapes[unknown.layer.starts[0]].shape
    sizes = [made[axis] for axis in numbers.out_spec[2:]]
    kernel = program.shapes[next(one for one in equation.reads if one not in program.data)].shape
    # Rows in the order of the output, whose axes may lie otherwise than those of the input.
    places = numbers.out_spec[0], *numbers.out_spec[2:]
    order = *sorted(range(len(places)), key=places.__getitem__), len(places)
    taps = []
    for tap in itertools.product(*(range(kernel[axis]) for axis in numbers.rhs_spec[2:])):
        steps = zip(tap, params["rhs_dilation"], params["window_strides"], sizes, strict=True)
        window = [slice(i * dilation, i * dilation + (size - 1) * stride + 1, stride)
                  for i, dilation, stride, size in steps]  # fmt: skip
        flat = x[(slice(None), *window)].transpose(order).reshape(-1, x.shape[-1])
        taps.append(flat if rows is None else flat[rows])
    return jnp.concatenate(taps, axis=1)


def end_rows(program: Program, site: Site, values: Values, rows: jax.Array | None = None) -> jax.Array:
    """Returns the end of a site as rows of channels `[r, m]`, float32, computed from these values."""
    end = program.evaluate(values, [site.end])[site.end]
    return channel_rows(end.reshape(site.shapes[site.end]), site.channel_axes, rows)


def channel_rows(value: jax.Array, axes: tuple[int, ...], rows: jax.Array | None = None) -> jax.Array:
    """Returns a value as rows `[r, m]` of its channels, float32."""
    found = at_rows(value, axes, rows)
    return found.reshape(len(found), -1)


def at_rows(value: jax.Array, axes: tuple[int, ...], rows: jax.Array | None = None) -> jax.Array:
    """Returns some rows of a value, over all its other axes, as `[r, *channels]`, float32."""
    last = tuple(range(value.ndim - len(axes), value.ndim))
    flat = jnp.moveaxis(value, axes, last).reshape(-1, *(value.shape[axis] for axis in axes)).astype(jnp.float32)
    return flat if rows is None else flat[rows]


def without(program: Program, site: Site, values: Values) -> dict[int, jax.Array]:
    """Returns the values with all products of a site's unknowns set to 0, to compute the end without them."""
    starts = [start for one in site.unknowns for start in one.layer.starts]
    return {**values, **{one: jnp.zeros(program.shapes[one].shape, program.shapes[one].dtype) for one in starts}}


class Solution(NamedTuple):
    """The solution of a ridge regression: unknowns `[d, m]`, intercept `[m]`, and the explained share of `y`."""

    effective: jax.Array
    intercept: jax.Array
    r2: jax.Array


def solve(
    site: Site, moments: Moments, prior: jax.Array, reach: tuple[jax.Array, jax.Array], valid: jax.Array, ridge: float
) -> Solution:
    """Returns `(X'X/n + r I)^-1 (X'T/n + r W0)` of centred rows, `r = ridge tr(X'X/n) / d max(1, d / n)`.

    Args:
      site: the site.
      moments: moments of its rows.
      prior: `W0 [d, m]`, the current unknowns.
      reach: which unknowns `[d, m]` and which intercepts `[m]` change the end; see `reaching`.
      valid: which channels have a source channel, bool `[m]`; the others do not change.
      ridge: dimensionless penalty.
    """
    d, count = site.num_unknowns, jnp.maximum(moments.weight, 1.0)
    x, t, _ = moments.means
    xx, xt, tt = (sums / count for sums in (moments.xx, moments.xt, moments.tt))
    centred = _bias_of(site) is not None
    if site.dense:
        used = jnp.any(reach[0], 1)
        x, xx, xt = x * used, xx * jnp.outer(used, used), xt * used[:, None]
        if not centred:
            xx, xt = xx + jnp.outer(x, x), xt + jnp.outer(x, t)
        size = ridge * jnp.maximum(1.0, d / count) * jnp.trace(xx) / d + _TINY
        wanted = jnp.where(reach[0], xt + size * prior, 0)
        found = jnp.asarray(jax.scipy.linalg.solve(xx + size * jnp.eye(d), wanted, assume_a="pos"))
        found = jnp.where(reach[0], found, 0)
        added = jnp.matmul(x, found, precision=_PRECISION)
        # X'X W = X'T + r (W0 - W): so X'X need not stay in memory beside its factors.
        left = tt - jnp.sum(found * (xt - size * (prior - found)), 0)
    else:
        if not centred:
            xx, xt = xx + x[:, :, None] * x[:, None], xt + x * t[:, None]
        size = ridge * jnp.maximum(1.0, d / count) * jnp.trace(xx, axis1=1, axis2=2) / d + _TINY
        wanted = xt + size[:, None] * prior.T
        solved = jnp.linalg.solve(xx + size[:, None, None] * jnp.eye(d)[None], wanted[..., None])[..., 0]
        found, added = solved.T, jnp.sum(x * solved, 1)
        left = tt - 2 * jnp.sum(solved * xt, 1) + jnp.einsum("md,mde,me->m", solved, xx, solved)
    takes = centred & reach[1]
    left = jnp.where(takes, left, left + jnp.square(t - added)) if centred else left + jnp.square(t)
    left = jnp.maximum(left, 0)  # Rounding makes a perfect fit negative.
    found = jnp.where(valid[None], found, prior)
    intercept = jnp.where(valid & takes, t - added, 0.0)
    spread = jnp.sum(jnp.where(valid, moments.yy / count, 0))
    share = jnp.sum(jnp.where(valid, left, 0)) / jnp.where(spread > 0, spread, 1.0)
    return Solution(found, intercept, jnp.where(spread > 0, 1 - share, jnp.nan))


def matrix(program: Program, unknown: Unknown, leaves: Values) -> jax.Array:
    """Returns a leaf as the matrix `[d, m]` of its inputs and channels."""
    leaf = leaves[program.leaves[unknown.layer.leaf]]
    return leaf.transpose(unknown.axes).reshape(unknown.inputs, -1).astype(jnp.float32)


def slope(program: Program, site: Site, unknown: Unknown, leaves: Values) -> jax.Array:
    """Returns the slope of the end in each channel's product, `[m]`; 1 if the slope depends on the data.

    In that case, the site's inputs include the slope.
    """
    if not unknown.layer.scaled:
        return jnp.ones(math.prod(site.channels))
    one = _along(program, site, unknown, leaves, jnp.ones(math.prod(site.channels)), site.end)
    return one - _along(program, site, unknown, leaves, None, site.end)


def reaching(program: Program, site: Site, leaves: Values, slopes: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns which unknowns `[d, m]` and intercepts `[m]` change the end; not those that meet a factor of 0.

    Args:
      program: the target.
      site: the site.
      leaves: the target's leaves.
      slopes: the slope of the end in the products of each unknown, `[m]`; a norm's gain is written, so it may be 0.
    """
    own = [jnp.broadcast_to((scale != 0) | (one.norm is not None) | (not site.dense), (one.inputs, scale.size))
           for one, scale in zip(site.unknowns, slopes, strict=True)]  # fmt: skip
    return jnp.concatenate(own), _bias_slope(program, site, leaves) != 0


def _bias_of(site: Site) -> str | None:
    """Returns the leaf that receives the intercept of a site."""
    return next((one.bias for one in site.unknowns if one.bias is not None), None)


def _bias_slope(program: Program, site: Site, leaves: Values) -> jax.Array:
    """Returns the slope of the end in the bias of a site, `[m]`; 0 without a bias."""
    bias = _bias_of(site)
    if bias is None:
        return jnp.zeros(math.prod(site.channels))
    number = program.leaves[bias]
    shape = program.shapes[number]
    ends = [_along(program, site, None, {**leaves, number: jnp.full(shape.shape, one, shape.dtype)}, None, site.end)
            for one in (0, 1)]  # fmt: skip
    return ends[1] - ends[0]


def _along(
    program: Program, site: Site, unknown: Unknown | None, leaves: Values, vector: jax.Array | None, wanted: int
) -> jax.Array:
    """Returns a value on the way from a site's starts, as channels `[m]`, with all other operands 0.

    All starts are 0, except for the first of an unknown, which is a vector `[m]` at all positions.
    """
    values: set[int] = set().union(*(one.layer.values for one in site.unknowns))
    known = without(program, site, leaves)
    for value in values:
        for other in program.equations[program.makers[value]].reads:
            if other in program.data and other not in values and other not in known:
                known[other] = jnp.zeros(program.shapes[other].shape, program.shapes[other].dtype)
    axes = site.channel_axes
    if unknown is not None:
        start, axes = unknown.layer.starts[0], axes if wanted == site.end else unknown.normed_axes
        if vector is not None:
            shape = site.shapes[start]
            sizes = [1] * len(shape)
            for axis, size in zip(unknown.start_axes, site.channels, strict=True):
                sizes[axis] = size
            order = sorted(range(len(unknown.start_axes)), key=lambda i: unknown.start_axes[i])
            spread = vector.reshape(site.channels).transpose(order).reshape(sizes)
            one = program.shapes[start]
            known[start] = jnp.broadcast_to(spread, shape).astype(one.dtype).reshape(one.shape)
    return channel_rows(program.evaluate(known, [wanted])[wanted].reshape(site.shapes[wanted]), axes)[0]


def write(program: Program, site: Site, leaves: Values, solution: Solution, moments: Moments) -> dict[int, jax.Array]:
    """Returns all leaves, with those of a site set so that its end is that without the unknowns, plus the solution.

    If running statistics normalise the way, a kernel's columns keep their norms, the statistics are those of the rows,
    and the gain compensates for both.
    """
    new = dict(leaves)
    before = _along(program, site, None, leaves, None, site.end)
    firsts = [sum(one.inputs for one in site.unknowns[:i]) for i in range(len(site.unknowns))]
    for unknown, first in zip(site.unknowns, firsts, strict=True):
        part = slice(first, first + unknown.inputs)
        layer, wanted, scale = unknown.layer, solution.effective[part], slope(program, site, unknown, leaves)
        if not site.dense and layer.scaled:  # The inputs include the slope.
            wanted = wanted * scale[None]
        if unknown.norm is None or not layer.scaled:
            kernel = wanted / jnp.where(scale == 0, 1.0, scale)[None]
            kernel = jnp.where(scale == 0, matrix(program, unknown, leaves), kernel)
            _put(new, program, unknown, kernel)
            continue
        old = jnp.sqrt(jnp.sum(jnp.square(matrix(program, unknown, leaves)), 0))
        size = jnp.sqrt(jnp.sum(jnp.square(wanted), 0))
        factor = jnp.where((size > 0) & (old > 0), old / jnp.maximum(size, _TINY), 1.0)
        kernel = wanted * factor[None]
        _put(new, program, unknown, kernel)
        _put_norm(new, program, site, unknown, _products(site, moments, part, kernel, scale), 1 / factor)
    bias = _bias_of(site)
    if bias is not None:
        number = program.leaves[bias]
        shape = program.shapes[number]
        more = before + solution.intercept - _along(program, site, None, new, None, site.end)
        slopes = _bias_slope(program, site, new)
        more = jnp.where(slopes == 0, 0.0, more / jnp.where(slopes == 0, 1.0, slopes))
        new[number] = (new[number].astype(jnp.float32) + more.reshape(shape.shape)).astype(shape.dtype)
    return new


def _put(leaves: dict[int, jax.Array], program: Program, unknown: Unknown, kernel: jax.Array) -> None:
    number = program.leaves[unknown.layer.leaf]
    shape = program.shapes[number]
    order = [unknown.axes.index(axis) for axis in range(len(shape.shape))]
    sizes = [shape.shape[axis] for axis in unknown.axes]
    leaves[number] = kernel.reshape(sizes).transpose(order).astype(shape.dtype)


def _products(
    site: Site, moments: Moments, part: slice, kernel: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance `[m]` of the products of inputs and a kernel `[d, m]`."""
    x, count = moments.means[0], jnp.maximum(moments.weight, 1.0)
    if site.dense:
        among = moments.xx[part, part] / count
        spread = jnp.sum(kernel * jnp.matmul(among, kernel, precision=_PRECISION), 0)
        return jnp.matmul(x[part], kernel, precision=_PRECISION), spread
    kernel = kernel.T / jnp.where(scale == 0, 1.0, scale)[:, None]
    return jnp.sum(x * kernel, 1), jnp.einsum("md,mde,me->m", kernel, moments.xx / count, kernel)


def _put_norm(
    leaves: dict[int, jax.Array],
    program: Program,
    site: Site,
    unknown: Unknown,
    products: tuple[jax.Array, jax.Array],
    slopes: jax.Array,
) -> None:
    """Sets the statistics of a layer's products, and the gain that gives the end these slopes."""
    norm = unknown.norm
    assert norm is not None
    mean, var = products
    at_mean = _along(program, site, unknown, leaves, mean, norm.normed)
    before = _along(program, site, unknown, leaves, jnp.ones_like(mean), norm.normed)
    before -= _along(program, site, unknown, leaves, None, norm.normed)
    gained = jnp.ones_like(mean)
    for path, value in ((norm.mean, at_mean), (norm.var, var * jnp.square(before)), (norm.gain, gained)):
        _put_vector(leaves, program, path, value)
    found = slope(program, site, unknown, leaves)
    _put_vector(leaves, program, norm.gain, jnp.where(found == 0, 0.0, slopes / jnp.where(found == 0, 1.0, found)))


def _put_vector(leaves: dict[int, jax.Array], program: Program, path: str, vector: jax.Array) -> None:
    number = program.leaves[path]
    shape = program.shapes[number]
    leaves[number] = vector.reshape(shape.shape).astype(shape.dtype)
