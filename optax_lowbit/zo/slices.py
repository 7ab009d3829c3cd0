"""The slice of a loss along random directions, of which every zeroth-order method is a functional.

.. math::
  \\phi(s) = L(\\theta + s\\, z(k))

The parameters are never changed to evaluate it, and neither the direction nor the perturbed tree is
ever held: see :mod:`~optax_lowbit.zo.late_perturbation`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.meshes import varying_axes
from optax_lowbit.kernels.ordering import data_zero
from optax_lowbit.kernels.parameters import rounded
from optax_lowbit.kernels.reference import widened
from optax_lowbit.zo.directions import Directions, Trainable, directions_of
from optax_lowbit.zo.late_perturbation import LowRank, Perturb, call_perturbed
from optax_lowbit.zo.noise import Noise, Probe


@dataclasses.dataclass(frozen=True)
class Slice:
    """A loss near parameters.

    Attributes:
      loss: Of the parameters: float32 ``()``.
      params: The parameters, and which of them train.
      noise: The distribution of directions.
      probe: What they are drawn from, but for the key.
      companions: What ``noise`` is given beside each leaf.
    """

    loss: Callable[[Any], jax.Array]
    params: Trainable
    noise: Noise
    probe: Probe
    companions: Any = None

    def here(self) -> jax.Array:
        """The loss at the parameters themselves."""
        return self.loss(self.params.tree(self.params.leaves))

    def at(self, key: jax.Array, s: jax.typing.ArrayLike) -> jax.Array:
        """The loss at ``theta + s z``; ``key`` has the keys of all leaves, ``(leaves, 2)``."""
        return self.line(key)(s)

    def line(self, key: jax.Array) -> Callable[[jax.typing.ArrayLike], jax.Array]:
        """:meth:`at` along one direction, whose scale is found once for all of its values."""
        directions = self._directions(key[None])
        return lambda s: self._moved(directions, jnp.asarray(s, jnp.float32)[None], None)

    def along(
        self, keys: jax.Array, slopes: jax.Array, rounding: jax.Array | None = None
    ) -> jax.Array:
        """The loss at ``theta + sum_i slopes[i] z_i``: float32.

        Each sum is made in float32 and cast to the dtype of its leaf once; codes are moved by whole
        places of their table.

        Args:
          keys: uint32 ``(n, leaves, 2)``.
          slopes: float32 ``(n,)``.
          rounding: uint32 ``(leaves, 2)``: keys for stochastic rounding; None: to nearest.
        """
        return self._moved(self._directions(keys), slopes, rounding)

    def tangent(self, key: jax.Array, s: jax.Array) -> jax.Array:
        """:meth:`at` for ``s = 0``, to be differentiated by ``s`` in forward mode.

        Parameters stay as they are, and their tangent is the direction.
        """
        directions = self._directions(key[None])

        # All arrays are arguments: a derivative rule may not close over any that are traced.
        @jax.custom_jvp
        def along(s, rows, latest, drawn_from):
            del s, latest, drawn_from
            return rows.values

        @along.defjvp
        def along_jvp(primals, tangents):
            s, rows, latest, (probe, keys, scale) = primals
            # What waits for the tangent alone can't be drawn while the loss itself is computed.
            zero = data_zero(latest) + data_zero(tangents[2])
            one = jnp.ones(1, jnp.float32)
            direction = Directions(self.noise, probe, keys, scale).sum(one, rows, zero)
            tangent = (tangents[0] * direction).astype(rows.values.dtype)
            return along(s, rows, latest, (probe, keys, scale)), tangent

        drawn_from = directions.probe, directions.keys, directions.scale
        keys = directions.keys
        return self._called(lambda rows, latest: along(s, rows, latest, drawn_from), s, keys)

    def _directions(self, keys: jax.Array) -> Directions:
        return directions_of(self.noise, self.probe, keys, self.params.leaves)

    def _moved(self, directions, slopes, rounding) -> jax.Array:
        def perturb(rows, latest):
            zero, grid = data_zero(latest), self.params.grids[rows.leaf]
            if grid is not None:  # or the codes of all leaves would be unpacked at once
                rows = dataclasses.replace(rows, values=rows.values | zero.astype(jnp.uint8))
            moves = directions.sum(slopes, self.params.opened(rows), zero)
            if grid is not None:
                return grid.moved(rows.values, moves)
            moved = widened(rows.values) + moves
            key = None if rounding is None else tuple(rounding[rows.leaf])
            return rounded(moved, rows.values.dtype, key, rows.indices())

        def factors(rows, latest):
            # Rounding is that of the sum, which must be formed then.
            is_exact = rounding is None
            return directions.factors(slopes, rows, data_zero(latest)) if is_exact else None

        return self._called(perturb, slopes, directions.keys, factors)

    def _called(
        self,
        perturb: Perturb,
        after: jax.Array,
        keys: jax.Array,
        factors: LowRank = lambda rows, latest: None,
    ) -> jax.Array:
        return call_perturbed(
            lambda leaves: self.loss(self.params.tree(leaves)),
            self.params.leaves, perturb, after, self.companions, factors,
            varying_axes(after) | varying_axes(keys),
        )  # fmt: skip
