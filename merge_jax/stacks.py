"""What adapters are put together from: stacks of layers, gates, and tokens that know their kind.

A module of an adapter maps a target matrix `[m, n]` and a source matrix `[p, q]` to `[m, n]`.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Gated", "Kinds", "Stack", "WithKinds"]

# Keeps the root mean square of a zero matrix, and its gradient, finite.
_EPSILON = 1e-12


class Stack(nn.Module):
    """Layers one after the other, the same source for each: `T_0 = T; T_{i+1} = Layer_i(T_i, S)`.

    Attributes:
      num_layers: layers in the stack.
      layer: the layer that is stacked, each with its own parameters.
    """

    num_layers: int
    layer: nn.Module

    @nn.compact
    def __call__(self, target: jax.Array, source: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps target `[m, n]` and source `[p, q]` to `[m, n]`."""
        for i in range(self.num_layers):
            layer = self.layer.clone(parent=self, name=f"layer_{i}")
            target = layer(target, source, deterministic=deterministic)  # type: ignore[operator]
        return target


class Gated(nn.Module):
    """A proposal as a change that a gate lets in: `T + g s (F(T / s, S / s_S) - T / s)`.

    `s` and `s_S` are the root mean squares of target and source. Our choice: the published output replaces the
    target and with it the target's scale, which only a following BatchNorm forgives; here a gate of 0 is the
    identity, the target keeps its scale, and both matrices meet at the scale that attention expects.

    Attributes:
      proposal: the module `F`.
      learned: whether the gate is a parameter, 0 at the start; otherwise it is given at each call.
    """

    proposal: nn.Module
    learned: bool = True

    @nn.compact
    def __call__(
        self,
        target: jax.Array,
        source: jax.Array,
        *,
        gate: jax.Array | float = 0.0,
        deterministic: bool = True,
    ) -> jax.Array:
        """Maps target `[m, n]` and source `[p, q]` to `[m, n]`; `gate` counts where it is not learned."""
        if self.learned:
            gate = jnp.asarray(self.param("gate", nn.initializers.zeros, ()))
        scale = _root_mean_square(target)
        normalised = target / scale
        source = source / _root_mean_square(source)
        proposed = self.proposal(normalised, source, deterministic=deterministic)  # type: ignore[operator]
        return target + gate * scale * (proposed - normalised)


def _root_mean_square(matrix: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(matrix)) + _EPSILON)


@dataclass(frozen=True)
class Kinds:
    """The kinds of a matrix's rows: `0 .. count - 1`, each `each` times in a row, all of it `times` times."""

    count: int
    each: int
    times: int

    def of_rows(self) -> np.ndarray:
        """Returns the kind of each row, `[each * count * times]`."""
        return np.tile(np.repeat(np.arange(self.count), self.each), self.times)


class WithKinds(nn.Module):
    """Tokens that know what they are: `F(T + E_T[kind of row], S + E_S[kind of row])`, with learned tables.

    The kind of a row is its place in a convolution's window, or which of query, key, value and output it is of;
    attention cannot tell rows apart by anything but their numbers.

    Attributes:
      proposal: the module `F`.
      target_kinds: kinds of the target's rows.
      source_kinds: kinds of the source's rows.
    """

    proposal: nn.Module
    target_kinds: Kinds
    source_kinds: Kinds

    @nn.compact
    def __call__(self, target: jax.Array, source: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps target `[m, n]` and source `[p, q]` to `[m, n]`."""

        def embed(matrix: jax.Array, kinds: Kinds, name: str) -> jax.Array:
            table = self.param(name, nn.initializers.normal(0.1), (kinds.count, matrix.shape[1]))
            return matrix + table[kinds.of_rows()]

        target = embed(target, self.target_kinds, "target_kinds_table")
        source = embed(source, self.source_kinds, "source_kinds_table")
        return self.proposal(target, source, deterministic=deterministic)  # type: ignore[operator]
