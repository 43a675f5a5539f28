"""Alignment: chooses source channels for the target's, consistently in all layers that share them."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp

from merge_jax.checks import check_choice
from merge_jax.paths import flatten, near_misses, replace
from merge_jax.transfers.alignment.fit import ChannelChoice, choose, even_adapter, fitted_adapter
from merge_jax.transfers.alignment.plan import AlignedLeaf, AlignmentPlan, plan_alignment, traced_layout
from merge_jax.transfers.alignment.write import aligned_leaf, new_leaf, written_leaves
from merge_jax.transfers.base import Key, Step, Transfer
from merge_jax.transfers.channels.axes import ChannelGraph
from merge_jax.transfers.channels.graph import LayerMoments, held_moments
from merge_jax.transfers.channels.merged_axes import apart
from merge_jax.transfers.describe import RouteCost, count_flops
from merge_jax.transfers.layerwise import kernel_routes
from merge_jax.transfers.pairing import ResolvedRoute, resolve
from merge_jax.transfers.routed import ByPath, routed_transfer
from merge_jax.transfers.routes import Routes
from merge_jax.types import Adapter, Params

__all__ = ["align", "aligned_transfer", "free_memory"]

_CGROUP = Path("/sys/fs/cgroup")


def aligned_transfer(
    routes: Routes,
    source_graph: ChannelGraph,
    target_graph: ChannelGraph,
    *,
    choice: ChannelChoice = "moments",
    key: jax.Array | None = None,
) -> Transfer:
    """Returns the transfer that copies whole channels of the source, with one choice for all layers that share them.

    `T' = A S R^T` for a layer's kernel, separately for each tap of a window. `A [m, p]` maps the source's `p` channels
    to the target's `m`. It is one matrix for all leaves that touch those channels: kernels, biases, norms, residual
    sums. `R [m, q]` reconstructs a layer's `q` source inputs from the target's `m`; each layer has its own. So a target
    layer with the chosen channels as inputs approximates the source's layer as well as possible. If each layer's block
    is copied separately (`share_transfer`), it reads channels that have moved.

    Channels inside attention heads have one `A [m, p]` for each head of the target, `[h, m, p]`, and a kernel that
    reads heads and channels together has `R [h, m, k, q]`. Axes with a meaning outside the models, such as tokens,
    pixels and labels, have no matrix: they are paired by index.

    `init` chooses channels evenly, with entries 0 and 1 in `A` and `R`: weight selection (arXiv:2311.18823) with tied
    choices. `fit` computes a better start from data. `A` and `R` can then be trained like any adapter; they are LiGO's
    operators (arXiv:2303.00980), tied along the channel graph. If the target has more channels, the source's fill the
    first ones, layers that read them ignore the others, and the rest of the target does not change. So a wider target
    computes the source's function if only kernels read its channels. It does not if a norm or a softmax divides by all
    channels, or if channels are multiplied with each other, as in attention with wider heads. Windows are aligned at
    their centres; a larger window is 0 outside. A leaf that both produces channels and is contracted along them, such
    as an embedding that is also the last layer, uses `A` for both, and is 0 for channels that the source lacks.

    Route all leaves that the models share, norms and biases included (`{"**": "**"}`), except last layers with other
    labels. Use it as a start: let it write once (`make_joint_step(..., stop=1 / num_steps, num_steps=...)`), since each
    transfer overwrites what the target has learned. Our choice.

    **Fit.** `transfer.fit(moments, source_params, target_params)` returns the adapter that preserves most of what
    the source's layers compute. It uses the second moments of their inputs: those of `input_moments`, on unlabelled
    inputs such as the target will see. It supports `jit`. Channels are chosen greedily. Each next channel is the one
    that, together with those before it, best reconstructs all channels of the group by a linear map, over all layers
    that read them. The order does not depend on their positions. Among equally good channels, to 1e-5 of the sum of all
    moments, the one with the larger parameters is chosen. Each layer that reads them then gets that map: with `G` the
    second moments of its input and `c` the chosen channels, `R = (G_cc + r I)^-1 G_c`, with `r` 1e-4 of the mean of
    `G_cc`'s diagonal.

    Attention heads are chosen by what they add to the output: `G [h, h]` are the moments, summed over the outputs, of
    each head's contribution to the product with the last kernel. In each chosen head, channels of queries and keys are
    chosen by the moments of their summed products, and channels of values by their own moments. The last kernel gets
    one `R` for heads and channels together. Channel groups and layers without moments stay as in `init`.

    Other choices treat each group at once. `magnitude` takes the channels with the largest sum of squares over all
    leaves that share them, which is structured pruning by groups (arXiv:2301.12900; by the L1 norm of one layer,
    arXiv:1608.08710). `random` and `even` are controls. Layer inputs are still reconstructed if there are moments;
    `fit({}, ...)` reconstructs nothing, which is plain pruning.

    Sources: the choice is orthogonal matching pursuit on channels; the map is the reconstruction of channel pruning (He
      et al., arXiv:1707.06168). Our choices are to do both for two given networks, tied over layers, and the measure
      for heads, which does not depend on the order of a head's channels.

    Args:
      routes: as in `share_transfer`, each from one leaf to one leaf.
      source_graph: the source's channel graph; see `channel_graph`.
      target_graph: the target's channel graph.
      choice: how `fit` chooses channels.
      key: for the random choice only.

    The adapter is `{"outputs": {channel group: A}, "inputs": {leaf:axes: R}}`, float32. `describe` gives its size.

    Raises:
      ValueError: an unknown choice, or a random one without a key; as `share_transfer`; a route with the view
        `attention`, or of several leaves; leaves with different numbers of channel axes or in different layouts; axes
        of unequal sizes that are not both hidden channels (labels, tokens, pixels); a channel graph of another model;
        in `init` and `fit`, an adapter that needs more than half of the free memory; in `fit`, moments of other
        names, or of another size than the layer's input; in `apply`, an adapter of other routes.
    """
    _check_choice(choice, key)
    named_routes, layout = kernel_routes(routes), traced_layout(source_graph, target_graph)

    def plan_routes(resolved: tuple[ResolvedRoute, ...]) -> AlignmentPlan:
        return plan_alignment(resolved, source_graph, target_graph)

    def start(key: jax.Array, plan: AlignmentPlan) -> Adapter:
        del key  # Nothing is random.
        _check_memory(plan)
        return even_adapter(plan)

    def move(plan: AlignmentPlan, adapter: Adapter, sources: ByPath, targets: ByPath, key: Key, step: Step) -> ByPath:
        del key, step
        _check_adapter(adapter, plan)
        new_leaves = {}
        for leaf in plan.leaves:
            given = targets[leaf.target], sources[leaf.source]
            new_leaves[leaf.target] = new_leaf(leaf, _matrices(leaf, adapter), *given)
        return new_leaves

    def costs(plan: AlignmentPlan) -> dict[int, RouteCost]:
        adapter, seen, found = jax.eval_shape(lambda: even_adapter(plan)), set(), {}
        for number, leaf in enumerate(plan.leaves):
            new = {str(leaf.axes[i].pair) for i in leaf.making} - seen
            seen |= new
            matrices = _matrices(leaf, adapter)
            size = sum(adapter["outputs"][name].size for name in new) + sum(
                one.size for one in matrices[len(leaf.making) :]
            )
            leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in leaf.shapes]
            flops = count_flops(functools.partial(aligned_leaf, leaf), matrices, *leaves)
            found[number] = RouteCost("outputs", size, flops)
        return found

    def fit(moments: Mapping[str, jax.Array], source_params: Params, target_params: Params) -> Adapter:
        plan = plan_routes(resolve(named_routes, source_params, target_params, layout=layout))
        _check_memory(plan)
        leaves = apart(flatten(source_params), source_graph.factors)
        return fitted_adapter(plan, source_graph, moments, leaves, choice, key)

    transfer = routed_transfer(named_routes, plan_routes, move, start=start, costs=costs, layout=layout)
    return dataclasses.replace(transfer, fit=fit)


def align(
    routes: Routes,
    source_graph: ChannelGraph,
    target_graph: ChannelGraph,
    source_params: Params,
    target_params: Params,
    moments: Mapping[str, jax.Array] | LayerMoments | None = None,
    *,
    choice: ChannelChoice = "moments",
    key: jax.Array | None = None,
) -> Params:
    """Returns the target that `aligned_transfer` writes once: `apply(fit(moments, ...), ...)`, without an adapter.

    The matrices of each leaf are made when it is written, and dropped. So a source on the host needs memory for the new
    target and one layer. With `layer_moments`, this includes the moments: the model is then computed once for the
    choice of channels and once for the layers that read them. Without moments, channels are chosen evenly for the
    choice `moments`, as in `init`. Source: as `aligned_transfer`; our choice is the order, by leaf.

    Args:
      routes: as in `aligned_transfer`.
      source_graph: the source's channel graph.
      target_graph: the target's channel graph.
      source_params: the source's parameters.
      target_params: the target's parameters; leaves without a route do not change.
      moments: of the source: `layer_moments(fn, params, *inputs)`, or those of `input_moments`.
      choice: how channels are chosen.
      key: for the random choice only.

    Raises:
      ValueError: as `aligned_transfer`.
    """
    _check_choice(choice, key)
    layout = traced_layout(source_graph, target_graph)
    resolved = resolve(kernel_routes(routes), source_params, target_params, layout=layout)
    plan, source = plan_alignment(resolved, source_graph, target_graph), flatten(source_params)
    given = moments if isinstance(moments, LayerMoments) else held_moments({} if moments is None else moments)
    chosen = choose(plan, source_graph, given, apart(source, source_graph.factors), choice, key)
    leaves = written_leaves(plan, chosen, source_graph, given, source, flatten(target_params))
    return replace(target_params, leaves)


def _check_choice(choice: ChannelChoice, key: jax.Array | None) -> None:
    check_choice("choice of channels", choice, get_args(ChannelChoice))
    if (choice == "random") != (key is not None):
        raise ValueError(f"a key is for the random choice of channels, and needed there; the choice is {choice!r}")


def _matrices(leaf: AlignedLeaf, adapter: Adapter) -> list[jax.Array]:
    """Returns the adapter's matrices for a leaf: those of its channels, then that of its inputs."""
    read = [adapter["inputs"][leaf.input_name]] if leaf.reading else []
    return [*(adapter["outputs"][name] for name in leaf.pairs_made), *read]


def free_memory() -> int | None:
    """Returns the free bytes on the first device; None if unknown.

    On a CPU, this is Linux's available memory, or the rest of a container's limit if that is less.
    """
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    free = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(1024 * int(lines["MemAvailable"].split()[0]))
        limit, used = ((_CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        free.append(int(limit) - int(used))
    except (OSError, KeyError, ValueError):
        pass  # Not Linux, or no limit ("max").
    return min(free, default=None)


def _check_memory(plan: AlignmentPlan) -> None:
    """Raises ValueError for an adapter that needs more than half of the free memory."""
    free, matrices = free_memory(), flatten(jax.eval_shape(lambda: even_adapter(plan)))
    total = sum(matrix.size * matrix.dtype.itemsize for matrix in matrices.values())
    if free is not None and total > free / 2:
        name, largest = max(matrices.items(), key=lambda item: item[1].size)
        raise ValueError(
            f"the adapter takes {total / 1e9:.3g} GB, more than half of the {free / 1e9:.3g} GB that are free; its "
            f"largest matrix is {name!r}, of {largest.shape}. Leave out the routes to leaves with these channels"
        )


def _check_adapter(adapter: Adapter, plan: AlignmentPlan) -> None:
    shapes = jax.eval_shape(lambda: even_adapter(plan))
    for part, expected in shapes.items():
        found = adapter.get(part, {})
        for name, matrix in expected.items():
            if name not in found:
                raise ValueError(
                    f"the adapter has no entry for {name!r}; was it made for other routes or models? "
                    f"{near_misses(name, found)}"
                )
            if found[name].shape != matrix.shape:
                raise ValueError(
                    f"the adapter's {name!r} does not fit; was it made for other models? Expected {matrix.shape}, got "
                    f"{found[name].shape}"
                )
