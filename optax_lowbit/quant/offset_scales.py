"""Block scales in 8 bits as QLoRA keeps them: less their mean, in groups over a whole matrix.

References:
  Dettmers et al, `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, Section 3, and bitsandbytes'
  ``quantize_4bit(..., compress_statistics=True)``, to whose reference in PyTorch, on an x86 CPU,
  codes, scales and mean are equal bit by bit. For moments there is
  :mod:`optax_lowbit.quant.double_quant`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.quant import codebooks, rounding, scaling

# Scales that share a scale, counted in row-major order.
GROUP = 256

# bitsandbytes' absmax of a group of zeros.
_LEAST_ABSMAX = 1e-38


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OffsetScales:
    """Block scales ``(..., blocks)`` or ``(..., n, blocks)`` in 8 bits each.

    A scale is ``table[code] * absmax[its group] + offset``. Leading axes are those of ``offset``:
    of stacked arrays, each with groups and a mean of its own.

    Attributes:
      codes: uint8 of the shape of the scales, of the signed dynamic-exponent table.
      absmax: float32 ``(..., ceil(scales / 256))``: over groups that run on over rows.
      offset: float32 ``(...)``: the mean of the scales.
    """

    codes: jax.Array
    absmax: jax.Array
    offset: jax.Array


def offset_scales(scales: jax.Array) -> OffsetScales:
    """The scales of one array, float32 ``(blocks,)`` or ``(n, blocks)``, in 8 bits each."""
    flat = scales.reshape(-1)
    offset = mean_as_bitsandbytes(flat)
    normalized, absmax = normalized_blocks(flat - offset, GROUP)
    # Compared as integers: arithmetic may take a number so small for 0.
    least = np.float32(_LEAST_ABSMAX).view(np.int32)
    bits = jnp.maximum(jax.lax.bitcast_convert_type(absmax, jnp.int32), least)
    absmax = jax.lax.bitcast_convert_type(bits, jnp.float32)
    codes = rounding.nearest_codes(normalized, _values()).reshape(scales.shape)
    return OffsetScales(codes, absmax, offset)


def float_scales(coded: OffsetScales) -> jax.Array:
    """The float32 scales; of stacked ones, too."""
    if coded.offset.ndim:
        return jax.vmap(float_scales)(coded)
    shape = coded.codes.shape
    number = sum(
        jax.lax.broadcasted_iota(jnp.int32, shape, axis) * math.prod(shape[axis + 1 :])
        for axis in range(len(shape))
    )
    # By index, not reshaped: sharded scales stay where they are.
    absmax = coded.absmax[number // GROUP]
    return rounding.code_values(coded.codes, _values()) * absmax + coded.offset


def offset_shapes(shape: tuple[int, ...]) -> OffsetScales:
    """The :class:`OffsetScales` of `jax.ShapeDtypeStruct` of one array's scales of ``shape``."""
    like: Any = jax.ShapeDtypeStruct
    groups = -(-math.prod(shape) // GROUP)
    return OffsetScales(like(shape, jnp.uint8), like((groups,), jnp.float32), like((), jnp.float32))


def normalized_blocks(flat: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
    """A vector over the largest magnitude of each block, in [-1, 1]; and those, one for a block.

    As bitsandbytes rounds it: by the product with a reciprocal, but in a last block that is not
    full by a quotient. Codes differ where the two do.
    """
    n = flat.size
    full = n // block_size * block_size
    blocks = flat[:full].reshape(-1, block_size)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    parts = [(blocks * scaling.divide(jnp.float32(1), absmax)[:, None]).reshape(-1)]
    maxima = [absmax]
    if full < n:
        rest = flat[full:]
        largest = jnp.max(jnp.abs(rest))
        parts.append(scaling.divide(rest, largest))
        maxima.append(largest[None])
    return jnp.clip(jnp.concatenate(parts), -1, 1), jnp.concatenate(maxima)


def mean_as_bitsandbytes(x: jax.Array) -> jax.Array:
    """The mean of a float32 vector, added up in PyTorch's order on an x86 CPU.

    Another order moves the last bit of the offset, and with it codes. There, eight lanes each have
    four sums; each of these adds 16 values up and carries the total over to a second sum, after 16
    of those to a third, ...; lanes and what is left over are added last.
    """
    lanes, rows = 8, 4
    n = x.size
    if n < lanes:
        return _quotient(_sum_of_rows(x[:, None], rows)[0], n)
    full = n // lanes * lanes
    by_lane = _sum_of_rows(x[:full].reshape(-1, lanes), rows)
    total = jnp.zeros((), jnp.float32)
    for value in [*x[full:], *by_lane]:
        total = total + value
    return _quotient(total, n)


def _quotient(total: jax.Array, count: int) -> jax.Array:
    """A float32 scalar over a number, rounded once, in a stack of them, too.

    XLA would multiply by the reciprocal of a constant, and of what all of a stack are divided by.
    """
    return total / jnp.where(jnp.isnan(total), jnp.float32(np.nan), jnp.float32(count))


def _sum_of_rows(x: jax.Array, rows: int) -> jax.Array:
    """The sum of ``(n, lanes)`` over ``n`` by interleaved rows, each of them a cascade."""
    n, lanes = x.shape
    full = n // rows * rows
    sums = list(_cascade(x[:full].reshape(-1, rows, lanes)))
    for value in x[full:]:
        sums[0] = sums[0] + value
    total = sums[0]
    for other in sums[1:]:
        total = total + other
    return total


def _cascade(x: jax.Array) -> jax.Array:
    """The sum over the first axis: of sums of ``step`` values, of ``step`` of those sums, ..."""
    levels = 4
    step = 2 ** max(4, math.ceil(math.log2(max(len(x), 1))) // levels)
    left_over = []
    for level in range(levels):
        full = len(x) // step * step if level < levels - 1 else 0
        left_over.append(_in_order(x[full:]))
        x = _in_order(jnp.moveaxis(x[:full].reshape(-1, step, *x.shape[1:]), 1, 0))
    total = left_over[0]
    for value in left_over[1:]:
        total = total + value
    return total


def _in_order(x: jax.Array) -> jax.Array:
    """The sum over the first axis, from first to last."""
    start = jnp.zeros(x.shape[1:], x.dtype)
    return jax.lax.scan(lambda total, value: (total + value, None), start, x)[0]


def _values() -> tuple[float, ...]:
    return tuple(codebooks.codebook("dynamic_exponent", 8, True).tolist())
