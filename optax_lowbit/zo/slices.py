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

from optax_lowbit.kernels.reference import widened
from optax_lowbit.zo.directions import Trainable, slope_sum
from optax_lowbit.zo.late_perturbation import call_perturbed
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
        return self.along(key[None], jnp.asarray(s, jnp.float32)[None])

    def along(self, keys: jax.Array, slopes: jax.Array) -> jax.Array:
        """The loss at ``theta + sum_i slopes[i] z_i``: float32.

        Each sum is made in float32 and cast to the dtype of its leaf once.
        """

        def perturb(rows, zero):
            moved = slope_sum(self.noise, self.probe, keys, slopes, rows, zero)
            return (widened(rows.values) + moved).astype(rows.values.dtype)

        return call_perturbed(
            lambda leaves: self.loss(self.params.tree(leaves)),
            self.params.leaves, perturb, self.companions,
        )  # fmt: skip
