"""Directions of low rank, and momentum that is kept in their factors."""

import dataclasses

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.reference import name_hash
from optax_lowbit.quant import random_bits
from optax_lowbit.zo.checks import check_count
from optax_lowbit.zo.directions import leaf_keys, outer
from optax_lowbit.zo.noise import Factors, Gaussian, Noise, columns, once, standard_normal, words
from optax_lowbit.zo.rows import Rows, whole


@dataclasses.dataclass(frozen=True)
class LowRank(Noise):
    r"""Products of two thin matrices: LOZO's directions.

    .. math::
      Z = U V^T, \qquad U_{ik}, V_{jk} \sim \mathcal{N}(0, 1/\sqrt{r}), \qquad
      E[Z_{ij} Z_{kl}] = \delta_{ik} \delta_{jl}

    ``U``, of ``r`` columns, is drawn in every probe. ``V`` is drawn every ``interval`` steps and is
    the same for all probes between. A leaf ``(..., m, n)`` is one matrix: its last axis are the
    columns, all others its rows; the layers of a stack have one ``V`` and each its own ``U``.
    Leaves of fewer than two axes have :class:`Gaussian` noise.

    **What is estimated.** Given ``V``, the mean of ``c Z`` is ``G V V^T / sqrt(r)``: the gradient,
    projected on ``r`` directions of a row. Over the draws of ``V``, that has the mean ``G``: the
    estimate is unbiased over many intervals, not inside of one.

    **Matmuls** with a leaf are evaluated as ``x W + s (x U) V^T``: no perturbed leaf is made. With
    ``probe_batch`` above 1, ``x W`` of all those probes is one matmul. Whatever else a program does
    with a leaf (a row that is looked up, a sum) forms the rows in question.

    Factors are normal values rounded to bfloat16, so their products are exact in float32, and ``Z``
    of rank 2 is the same however it was compiled.

    Differs from the reference: its ``Z`` has ``r`` times our variance, so that its ``eps`` is ours
    over ``sqrt(r)``; and where it draws ``V`` anew, it updates along another direction than it
    has probed.

    Attributes:
      rank: ``r``.
      interval: Steps that ``V`` lives.

    Raises:
      ValueError: If one of them is no int of at least 1.

    Examples:
      >>> from optax_lowbit import zo
      >>> opt = zo.zo_sgd(1e-6, num_probes=8, noise=zo.LowRank(rank=2), probe_batch=8)

    References:
      Chen et al, `Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures
      <https://arxiv.org/abs/2410.07698>`_, 2024, Algorithm 1; the matmul: Sarkar et al, `Evolution
      Strategies at the Hyperscale <https://arxiv.org/abs/2511.16652>`_, 2025.
    """

    rank: int = 2
    interval: int = 50

    def __post_init__(self):
        check_count("rank", self.rank)
        check_count("interval", self.interval)

    def prepare(self, prepared, params, run, step):
        """For each leaf two keys of ``V``, now and an interval ago; None if it has one axis."""
        del prepared
        turns = jnp.stack([step, jnp.maximum(step - self.interval, 0)]) // self.interval
        own = random_bits.fold_in(run, name_hash("low rank"))
        keys = leaf_keys(random_bits.fold_in(own, turns[:, None]), params.paths)
        return tuple(keys[:, i] if leaf.ndim > 1 else None for i, leaf in enumerate(params.leaves))

    def draw(self, probe, rows):
        """The product."""
        factors = self.factors(probe, rows)
        return Gaussian().draw(probe, rows) if factors is None else outer(*factors[:2])

    def factors(self, probe, rows):
        """``U`` of these rows, and ``V``."""
        keys = probe.prepared[rows.leaf]
        if keys is None:
            return None
        n = columns(rows)
        right, before = (
            self._normal((key[0] + jnp.uint32(probe.zero), key[1]), _all_rows(n)) for key in keys
        )
        return Factors(self._normal(probe.key, rows), right, before)

    def _normal(self, key: random_bits.Key, rows: Rows) -> jax.Array:
        def make():
            values = standard_normal(words(key, rows, self.rank)) * jnp.float32(self.rank**-0.25)
            return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)

        return once(key, make)


def _all_rows(n: int) -> Rows:
    return whole(0, jnp.zeros((n, 1), jnp.float32))
