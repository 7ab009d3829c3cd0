"""Directions of one length."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from optax_lowbit.zo.noise import Gaussian, Probe
from optax_lowbit.zo.rows import Rows

# How many elements of a direction are held at a time to find its length.
CHUNK_ELEMENTS = 2**16


@dataclasses.dataclass(frozen=True)
class Sphere(Gaussian):
    r"""Uniform on the sphere of radius ``sqrt(d)``, for ``d`` elements of all leaves that train.

    .. math::
      z = \sqrt{d}\, \frac{g}{\lVert g \rVert}, \quad g \sim \mathcal{N}(0, I_d), \qquad
      E[z z^T] = I

    **Cost.** The length of ``g`` needs its random numbers once more for each probe, and once more
    for the update. They are summed up a few rows at a time and never kept. On a mesh every device
    does so for all leaves, in one order, so the length is the same on every mesh.

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

        def squares(keys):
            parts = [
                self._squares(probe._replace(key=(key[0], key[1])), leaf.shape)
                for key, leaf in zip(keys, leaves, strict=True)
            ]
            return functools.reduce(jnp.add, parts)

        return jnp.sqrt(jnp.float32(size) / jax.lax.map(squares, keys))

    def _squares(self, probe: Probe, shape: tuple[int, ...]) -> jax.Array:
        """The sum of squares of ``g`` in one leaf."""
        *leading, n = shape or (1,)
        count = math.prod(leading)
        height = max(1, min(count, CHUNK_ELEMENTS // max(n, 1)))
        first = jnp.arange(height, dtype=jnp.uint32)[:, None]

        def add(i, total):
            numbers = first + i.astype(jnp.uint32) * jnp.uint32(height)
            g = self.draw(probe, Rows(jnp.zeros((height, n), jnp.float32), numbers))
            return total + jnp.sum(jnp.where(numbers < count, g * g, 0))

        return jax.lax.fori_loop(0, -(-count // height), add, jnp.float32(0))
