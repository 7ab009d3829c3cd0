"""Directions of one length."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from optax_lowbit.zo.directions import Directions
from optax_lowbit.zo.noise import Gaussian
from optax_lowbit.zo.rows import whole


@dataclasses.dataclass(frozen=True)
class Sphere(Gaussian):
    r"""Uniform on the sphere of radius ``sqrt(d)``, for ``d`` elements of all leaves that train.

    .. math::
      z = \sqrt{d}\, \frac{g}{\lVert g \rVert}, \quad g \sim \mathcal{N}(0, I_d), \qquad
      E[z z^T] = I

    The length of ``g`` costs one more sweep of random numbers for each probe, which is reduced leaf
    by leaf: no direction is kept. Where a mesh or a compiler adds up in another order, lengths
    differ in the last bit.

    Examples:
      >>> from optax_lowbit import zo
      >>> opt = zo.zo_sgd(1e-6, noise=zo.Sphere())

    References:
      Flaxman et al, `Online convex optimization in the bandit setting
      <https://arxiv.org/abs/cs/0408007>`_, 2004.
    """

    def scale(self, probe, keys, leaves):
        """``sqrt(d) / |g|`` of each probe."""
        size = sum(leaf.size for leaf in leaves)
        one = jnp.ones(1, jnp.float32)

        def squares(key):
            drawn = Directions(self, probe, key[None], one)
            parts = [drawn.sum(one, whole(i, leaf), probe.zero) for i, leaf in enumerate(leaves)]
            return functools.reduce(jnp.add, [jnp.sum(part * part) for part in parts])

        return jnp.sqrt(jnp.float32(size) / jax.lax.map(squares, keys))
