"""Directions in a small subspace of each matrix."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.reference import name_hash
from optax_lowbit.quant import random_bits
from optax_lowbit.zo.checks import check_count
from optax_lowbit.zo.directions import Trainable, leaf_keys, outer
from optax_lowbit.zo.noise import Factors, Gaussian, Noise, standard_normal, words
from optax_lowbit.zo.refresh import refreshed
from optax_lowbit.zo.rows import whole


@dataclasses.dataclass(frozen=True)
class Subspace(Noise):
    r"""Normal values between orthonormal bases: SubZero's directions.

    .. math::
      Z = \frac{\sqrt{m n}}{r}\, U S V^T, \qquad S \sim \mathcal{N}(0, I_{r^2}), \qquad
      U^T U = V^T V = I_r

    ``U`` of ``(m, r)`` and ``V`` of ``(n, r)`` come from QR of normal values every ``interval``
    steps; ``S`` is drawn in every probe. In a leaf ``(..., m, n)`` each matrix has its own ``U``
    and ``S``, and all have one ``V``. ``r`` is at most ``min(m, n)``. Leaves of fewer than two axes
    have :class:`Gaussian` noise.

    **What is estimated.** Within an interval, ``U U^T G V V^T`` times ``m n / r^2``: the gradient
    in the subspace, scaled. Over the draws of ``U`` and ``V`` that has the mean ``G``. Elements of
    ``Z`` have the variance 1 on the average of a leaf.

    **Memory.** The bases, in float32: ``4 r (m + n)`` bytes for a matrix. Matmuls with a leaf form
    no perturbed leaf, as with :class:`LowRank`.

    Differs from the reference, which reshapes the thin matrices of adapters to near squares first.

    Attributes:
      rank: ``r``.
      interval: Steps that the bases live.

    Raises:
      ValueError: If one of them is no int of at least 1.

    Examples:
      >>> from optax_lowbit import zo
      >>> opt = zo.zo_sgd(1e-6, noise=zo.Subspace(rank=24, interval=1000))

    References:
      Yu et al, `Zeroth-Order Fine-Tuning of LLMs in Random Subspaces
      <https://arxiv.org/abs/2410.08989>`_, 2024, Algorithms 1 to 3.
    """

    rank: int = 24
    interval: int = 1000

    def __post_init__(self):
        check_count("rank", self.rank)
        check_count("interval", self.interval)

    def prepare(self, prepared, params, run, step):
        """For each leaf its bases ``(..., m, r)`` and ``(n, r)``; None if it has one axis."""
        make = functools.partial(self._bases, params, run, step // self.interval)
        return refreshed(prepared, step, self.interval, make)

    def draw(self, probe, rows):
        """The product."""
        factors = self.factors(probe, rows)
        return Gaussian().draw(probe, rows) if factors is None else outer(*factors[:2])

    def factors(self, probe, rows):
        """``U S`` of these rows, scaled, and ``V``."""
        bases = probe.prepared.value[rows.leaf]
        if bases is None:
            return None
        left, right = bases
        rank = right.shape[-1]
        matrices = whole(0, jnp.zeros((math.prod(left.shape[:-2]), 1), jnp.float32))
        inner = standard_normal(words(probe.key, matrices, rank * rank))
        inner = inner.reshape(*left.shape[:-2], rank, rank)
        scale = math.sqrt(left.shape[-2] * len(right)) / rank
        left = jnp.matmul(left, inner, precision="highest").reshape(-1, rank) * jnp.float32(scale)
        return Factors(left[rows.numbers[..., 0]], right)

    def _bases(self, params: Trainable, run: random_bits.Key, turn: jax.Array):
        own = random_bits.fold_in(run, name_hash("subspace"))
        sides = random_bits.fold_in(random_bits.fold_in(own, turn), jnp.arange(2)[:, None])
        keys = leaf_keys(sides, params.paths)

        def bases(left_key, right_key, shape):
            rank = min(self.rank, *shape[-2:])
            return (
                _orthonormal(left_key, (*shape[:-1], rank)),
                _orthonormal(right_key, (shape[-1], rank)),
            )

        return tuple(
            bases(keys[0, i], keys[1, i], leaf.shape) if leaf.ndim > 1 else None
            for i, leaf in enumerate(params.leaves)
        )


def _orthonormal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Orthonormal columns, uniformly distributed: Q of the QR decomposition of normal values."""
    values = standard_normal(words(tuple(key), whole(0, jnp.zeros(shape)), shape[-1]))
    # Signs of Q's columns, which QR leaves open, do not matter between normal values.
    return jnp.linalg.qr(values)[0]
