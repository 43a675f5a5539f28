"""A compiled epoch over several devices, of one process or several hosts."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from merge_jax.training.epoch import Epoch

__all__ = ["DATA_AXIS", "Layout", "data_mesh", "jit_layout", "pmap_layout", "state_shardings"]

DATA_AXIS = "data"
"""The name of the axis along which batches are split."""

_SMALLEST_SHARDED = 2**12  # Elements; gathering a smaller leaf costs more than replicating it.

_Tree = TypeVar("_Tree")


class Layout(NamedTuple):
    """Functions that place a run's trees on its devices.

    Attributes:
      num_devices: the number of devices that share a batch.
      put_state: places a training state; its values stay the same.
      put_arrays: places the examples, a copy on every device.
      put_indices: places `{role: [..., B]}`, the last axis split over the devices; raises ValueError if it is not
        divisible.
      lower: `(epoch, state, arrays, indices, count) -> Lowered`, for arrays or their shapes; the state is donated.
    """

    num_devices: int
    put_state: Callable[[Any], Any]
    put_arrays: Callable[[Any], Any]
    put_indices: Callable[[Mapping[str, np.ndarray]], Any]
    lower: Callable[..., Lowered]


def data_mesh(num_devices: int | None = None) -> Mesh:
    """Returns a mesh of one axis, `data`, over the first devices on all hosts; all of them by default.

    Its axis has type `Auto`: the compiler partitions the work from the placement of the arguments.

    Raises:
      ValueError: there are fewer devices.
    """
    devices = _first_devices(num_devices)
    return Mesh(np.array(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def _auto(mesh: Mesh) -> Mesh:
    """Returns the mesh with Auto axes; with Explicit axes, as in `jax.make_mesh`, the compiler does not shard."""
    return mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _first_devices(number: int | None) -> list[Any]:
    devices = jax.devices()
    number = len(devices) if number is None else number
    if not 1 <= number <= len(devices):
        raise ValueError(f"the number of devices must lie in [1, {len(devices)}], got {number}")
    if number < len(devices) and jax.process_count() > 1:
        raise ValueError(f"with several processes all {len(devices)} devices take part, got {number}")
    return devices[:number]


def state_shardings(state: _Tree, mesh: Mesh, *, sharded: bool) -> _Tree:
    """Returns the placement of each leaf: replicated on every device, or, if `sharded`, split over them (FSDP).

    If sharded, every leaf (parameters, optimizer moments, adapter) is split along its largest axis that the number of
    devices divides; small leaves and those without such an axis are replicated. Values do not change: the compiler
    gathers leaves, or computes on shards and sums the results if that moves less. Moments are placed like their
    parameters, since their shapes match. Our choice: the largest axis, so that shards are contiguous more often.
    """
    mesh = _auto(mesh)

    def placement(leaf: Any) -> NamedSharding:
        spec = PartitionSpec()
        axes = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if sharded and axes and leaf.size >= _SMALLEST_SHARDED:
            axis = max(axes, key=lambda axis: leaf.shape[axis])
            spec = PartitionSpec(*[None] * axis, DATA_AXIS)
        return NamedSharding(mesh, spec)

    return jax.tree.map(placement, state)


def jit_layout(mesh: Mesh, *, sharded: bool = False) -> Layout:
    """Returns data parallelism by `jit`: the compiler partitions one program over the whole batch.

    The program is that of one device, so BatchNorm normalises over the whole batch, and models need no change.

    Args:
      mesh: from `data_mesh`, or another with an axis `data`; it may span several hosts. Axes are treated as Auto.
      sharded: whether to shard the state too; see `state_shardings`.
    """
    mesh = _auto(mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

    def split(rank: int) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*[None] * (rank - 1), DATA_AXIS))

    def put_indices(indices: Mapping[str, np.ndarray]) -> Any:
        _check_divides(indices, mesh.size)
        return {role: _put(array, split(array.ndim)) for role, array in indices.items()}

    def lower(epoch: Epoch, state: Any, arrays: Any, indices: Any, count: Any) -> Lowered:
        _check_divides(indices, mesh.size)
        # Shapes suffice, and several processes cannot pass local arrays that are to be sharded.
        state, arrays, indices, count = jax.eval_shape(lambda *trees: trees, state, arrays, indices, count)
        placement = state_shardings(state, mesh, sharded=sharded)
        program = jax.jit(
            epoch,
            donate_argnums=0,
            in_shardings=(placement, replicated, jax.tree.map(lambda leaf: split(leaf.ndim), indices), replicated),
            out_shardings=(placement, replicated),
        )
        return program.lower(state, arrays, indices, count)

    return Layout(
        mesh.size,
        lambda state: jax.tree.map(_put, state, state_shardings(state, mesh, sharded=sharded)),
        lambda arrays: jax.tree.map(lambda leaf: _put(leaf, replicated), arrays),
        put_indices,
        lower,
    )


def pmap_layout(num_devices: int | None = None) -> Layout:
    """Returns data parallelism by `pmap`: one program per device, with averages over the axis `data`.

    JAX keeps `pmap` in maintenance only, and `jit_layout` does all this and more. The joint step needs
    `axis_name=DATA_AXIS`. So do models whose BatchNorm should cover the whole batch, and losses that compare examples
    with each other (`feature_agreement`, `mixed`, `retrieval_loss`); in your own loss, `whole_batch` gathers the
    compared values. State and examples are passed and returned as on one device.

    Raises:
      ValueError: there are fewer devices, or several processes.
    """
    devices = _first_devices(num_devices)
    if jax.process_count() > 1:
        raise ValueError("pmap is for one process: use jit with several hosts")

    def put_indices(indices: Mapping[str, np.ndarray]) -> Any:
        _check_divides(indices, len(devices))
        return {
            role: np.moveaxis(array.reshape(*array.shape[:-1], len(devices), -1), -2, 0)
            for role, array in indices.items()
        }

    def lower(epoch: Epoch, state: Any, arrays: Any, indices: Any, count: Any) -> Lowered:
        program = jax.pmap(
            epoch, DATA_AXIS, in_axes=(None, None, 0, None), out_axes=None, devices=devices, donate_argnums=0
        )
        return program.lower(state, arrays, jax.eval_shape(put_indices, indices), count)

    # A compiled program requires fixed placements, and a restored state may be placed anywhere.
    replicated = NamedSharding(data_mesh(len(devices)), PartitionSpec())

    def put(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: _put(leaf, replicated), tree)

    return Layout(len(devices), put, put, put_indices, lower)


def _check_divides(indices: Mapping[str, Any], num_devices: int) -> None:
    for role, array in indices.items():
        if array.shape[-1] % num_devices:
            raise ValueError(
                f"a batch of {array.shape[-1]} ({role}) does not divide among {num_devices} devices: "
                f"take a multiple of {num_devices}, or fewer devices"
            )


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Places an array that is identical in every process."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), NamedSharding(sharding.mesh, PartitionSpec()))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
