"""Weight distillation: a generator computes the target's weights from the source's."""

from typing import Unpack

import flax.linen as nn
import jax
import jax.numpy as jnp

from merge_jax.transfers.adapters.adapter import AdapterOptions, adapter_transfer
from merge_jax.transfers.base import Transfer
from merge_jax.transfers.routes import Routes

__all__ = ["ParameterGenerator", "parameter_generator_transfer"]


class ParameterGenerator(nn.Module):
    """Generates weights: `F(S) = C * tanh(A S B) + D`, with learned `A [m, p]`, `B [q, n]`, `C [m, n]`, `D [m, n]`.

    `A` and `B` start Xavier-normal, `C` as ones and `D` as zeros. The target's weights are not used.
    """

    @nn.compact
    def __call__(self, target: jax.Array, source: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps the source `[p, q]` to `[m, n]`, the shape of the target; its values are not used."""
        del deterministic  # Nothing is random.
        (m, n), (p, q) = target.shape, source.shape
        rows = self.param("rows", nn.initializers.xavier_normal(), (m, p), jnp.float32)
        columns = self.param("columns", nn.initializers.xavier_normal(), (q, n), jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (m, n), jnp.float32)
        shift = self.param("shift", nn.initializers.zeros, (m, n), jnp.float32)
        return scale * jnp.tanh(rows @ source @ columns) + shift


def parameter_generator_transfer(routes: Routes, **options: Unpack[AdapterOptions]) -> Transfer:
    """Returns weight distillation's parameter generator: `T' = C * tanh(A S B) + D`, all four learned.

    `S [p, q]` is the source's matrix; see `ParameterGenerator`. The target's weights depend on nothing else, so the
    target starts random, and training is through the generator: `make_reparameterised_step` is the paper's first phase,
    `bake` and further training its second.

    Source: arXiv:2009.09152, with the equation and initialisation of its code (Lollipop321/weight-distillation). There
    the `L` source layers of a group share `A` and `B` and are then mixed by learned weights: `sum_l c_l A S_l B`. Here
    they are stacked to one matrix `[L p, q]` (a route of several source leaves), each with a separate `A`. `c_l A` is a
    special case of that; our choice, since leaves need not have one shape. Our choices too are convolutions, whose
    columns are inputs x window, and all output forms but `published`, the default.

    Args:
      routes: as `adapter_transfer`.
      **options: `output`, `rank`, `view`, `gate`, `shared`, `padding`; see `adapter_transfer`.

    Raises:
      ValueError: as `adapter_transfer`.
    """
    options.setdefault("output", "published")
    return adapter_transfer(routes, ParameterGenerator(), **options)
