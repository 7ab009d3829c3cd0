"""Weight-decomposed adapters: the columns of ``W + scale A^T B``, each with a trained length."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.adapters.arrays import dequantized
from optax_lowbit.kernels.reference import float_dtype


@jax.jit
def column_norms(base: Any, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    r"""Lengths of the columns of ``W + scale A^T B``, ``(..., m)``, not differentiated.

    .. math::
      \|w_j + s A^T b_j\|^2 = \|w_j\|^2 + 2 s\, b_j \cdot A w_j + s^2\, b_j \cdot A A^T b_j

    so that the sum is never formed: only ``A W``, of the size of ``B``.

    Args:
      base: ``W``, of any shape that is that of ``(..., n, m)`` with axes apart; or a
        :class:`QuantizedMatrix`, which is dequantized.
      a: ``(..., r, n)``.
      b: ``(..., r, m)``.
      scale: ``s``.

    References:
      Liu et al, `DoRA <https://arxiv.org/abs/2402.09353>`_, 2024, Section 4.3: the length is a
      constant for the derivative.
    """
    base, a, b = jax.lax.stop_gradient((base, a, b))
    dtype = float_dtype(base.dtype)
    a, b = a.astype(dtype), b.astype(dtype)
    w = dequantized(base).astype(dtype).reshape(*a.shape[:-2], a.shape[-1], b.shape[-1])
    cross = jnp.sum(b * jnp.matmul(a, w, precision="highest"), axis=-2)
    square = jnp.sum(
        b * jnp.matmul(jnp.matmul(a, a.mT, precision="highest"), b, precision="highest"), axis=-2
    )
    squares = jnp.sum(jnp.square(w), axis=-2) + 2 * scale * cross + scale**2 * square
    return jnp.sqrt(jnp.maximum(squares, 0))


def column_scales(
    base: Any, a: jax.Array, b: jax.Array, scale: float, magnitude: jax.Array
) -> jax.Array:
    """What each column of ``W + scale A^T B`` is multiplied with to have the length ``magnitude``.

    A column of zeros stays as it is.
    """
    norms = column_norms(base, a, b, scale)
    magnitude = magnitude.astype(norms.dtype)
    return jnp.where(norms > 0, magnitude / jnp.where(norms > 0, norms, 1), 1)
