"""Scales: what a float array is divided by so that its values fit a code table in [-1, 1].

========== =======================================================================================
scaling    scales of ``x: (..., n, m)``, always of the rank of ``x``
========== =======================================================================================
tensor     one, ``(..., 1, 1)`` with all axes 1
row        ``(..., n, 1)``, over the last axis
column     ``(..., 1, m)``, over the last but one axis; an array with one axis is one column
block      ``(..., n, ceil(m / block_size))``, over blocks along the last axis
rank1      ``(..., n, 1)`` and ``(..., 1, m)``; an element's scale is the lesser of the two
========== =======================================================================================

Leading axes are batch axes everywhere but in ``"tensor"``, so stacked layers and experts share no
scales. ``"rank1"`` is the exception that keeps small kernels small: see :func:`rank1_axes`.

References:
  Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
  2023, Section 4.2 and Algorithm 4.
"""

import math

import jax
import jax.numpy as jnp

Scales = jax.Array | tuple[jax.Array, ...]

NAMES = ("block", "column", "rank1", "row", "tensor")


def rank1_axes(shape: tuple[int, ...], block_size: int) -> int:
    """How many trailing axes have maxima of their own under ``"rank1"``; the others are batch axes.

    The fewest, and at least two, whose scales take no more bytes than blocks' would;
    all axes (the paper's rule) where no choice achieves that, as in a small convolution kernel.
    """
    for axes in range(2, len(shape)):
        trailing = shape[-axes:]
        if sum(trailing) * block_size <= math.prod(trailing):
            return axes
    return len(shape)


def effective_scaling(scaling: str, ndim: int) -> str:
    """The scaling that an array of ``ndim`` axes gets: rank-1 is block-wise on a vector."""
    return "block" if scaling == "rank1" and ndim == 1 else scaling


def absmax_scales(
    x: jax.Array, scaling: str, block_size: int, *, signed_scale: bool = False, axes: int = 0
) -> Scales:
    """The largest magnitudes of float32 ``x``, not 0-d, as laid out in the module's table.

    Args:
      x: float32.
      scaling: One of :data:`NAMES`.
      block_size: Elements in a block.
      signed_scale: Give a scale the sign of the element with the largest magnitude (+ if both signs
        reach it). Not for ``"rank1"``.
      axes: For ``"rank1"``, :func:`rank1_axes` of the whole array, of which ``x`` may be a part.
    """
    largest = _signed_absmax if signed_scale else absmax
    match effective_scaling(scaling, x.ndim):
        case "tensor":
            return largest(x, tuple(range(x.ndim)))
        case "row":
            return largest(x, (-1,))
        case "column":
            return largest(x, (max(x.ndim - 2, 0),))
        case "block":
            return _block_absmax(x, block_size, largest)
        case _:
            trailing = range(x.ndim - axes, x.ndim)
            return tuple(
                largest(x, tuple(other for other in trailing if other != axis)) for axis in trailing
            )


def merge_scales(a: Scales, b: Scales) -> Scales:
    """Scales of a whole from those of two parts: the larger magnitude, with its sign, or NaN."""

    def larger(x, y):
        return jnp.where((jnp.abs(x) < jnp.abs(y)) | jnp.isnan(y), y, x)

    return jax.tree.map(larger, a, b)


def expand_scales(
    scales: Scales, scaling: str, block_size: int, shape: tuple[int, ...]
) -> jax.Array:
    """One scale for each element of an array of ``shape``, or an array that broadcasts to that."""
    if isinstance(scales, tuple):
        smallest = scales[0]
        for scale in scales[1:]:
            smallest = jnp.minimum(smallest, scale)
        return smallest
    if effective_scaling(scaling, len(shape)) != "block":
        return scales
    *lead, n = shape
    full = n // block_size
    wide = jnp.broadcast_to(scales[..., :full, None], (*lead, full, block_size))
    wide = wide.reshape(*lead, full * block_size)
    if n % block_size == 0:
        return wide
    tail = jnp.broadcast_to(scales[..., full:], (*lead, n % block_size))
    return jnp.concatenate([wide, tail], axis=-1)


def divide(x: jax.Array, scale: jax.Array) -> jax.Array:
    """``x / scale``, and 0 where the scale is 0 (all of its elements are)."""
    nonzero = scale != 0
    return jnp.where(nonzero, x / jnp.where(nonzero, scale, 1.0), 0.0)


def scale_shapes(
    shape: tuple[int, ...], scaling: str, block_size: int
) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """Shapes of the scales of an array of ``shape``: a tuple of shapes under ``"rank1"``."""
    if not shape:
        return ()
    ndim = len(shape)
    match effective_scaling(scaling, ndim):
        case "tensor":
            return (1,) * ndim
        case "row":
            return (*shape[:-1], 1)
        case "column":
            return (*shape[:-2], 1, *shape[-1:]) if ndim > 1 else (1,)
        case "block":
            return (*shape[:-1], -(-shape[-1] // block_size))
        case _:
            axes = rank1_axes(shape, block_size)
            return tuple(
                (*shape[:-axes], *(d if i == kept else 1 for i, d in enumerate(shape[-axes:])))
                for kept in range(axes)
            )


def absmax(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    """Largest magnitudes of float32 ``x`` along axes, which are kept as 1; NaN if there is one."""
    # As integers, in which NaN is the largest: on a CPU a maximum of floats loses it (jax 0.10).
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    largest = jnp.max(bits, axis=axis, keepdims=True, initial=0)
    return jax.lax.bitcast_convert_type(largest, jnp.float32)


def _signed_absmax(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    largest = absmax(x, axis)
    high = jnp.max(x, axis=axis, keepdims=True, initial=0.0)
    return jnp.where(high < largest, -largest, largest)


def _block_absmax(x: jax.Array, block_size: int, largest) -> jax.Array:
    *lead, n = x.shape
    full = n // block_size
    parts = []
    if full or n == 0:
        blocks = x[..., : full * block_size].reshape(*lead, full, block_size)
        parts.append(largest(blocks, (-1,))[..., 0])
    if n % block_size:
        parts.append(largest(x[..., full * block_size :], (-1,)))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
