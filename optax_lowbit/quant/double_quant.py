"""Block scales that are themselves kept in 8 bits: double quantization.

References:
  Dettmers et al, `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, Section 3. There groups run
  over the flattened scales, less their mean; here down the rows of a matrix, so that a shard's
  scales are its own, and without a mean, as the scales of moments spread over many magnitudes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.quant import codebooks, random_bits, rounding, scaling

# Scales that share a scale.
GROUP = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedScales:
    """Block scales ``(..., n, blocks)`` in 8 bits each.

    Attributes:
      codes: uint8 of the shape of the scales, of the dynamic-exponent table.
      absmax: float32 ``(..., ceil(n / 256), blocks)``: the largest of 256 rows' scales of one
        column of blocks. A vector's are ``(ceil(blocks / 256),)``, over consecutive blocks.
    """

    codes: jax.Array
    absmax: jax.Array


def code_scales(scales: jax.Array, signed: bool, key: random_bits.Key | None = None) -> CodedScales:
    """Block scales in 8 bits, rounded to nearest, or stochastically with a key.

    A scale that is not zero is never rounded to zero, under which its whole block would vanish. One
    that is not finite makes the others of its group so.

    Args:
      scales: float32 ``(..., n, blocks)`` or ``(blocks,)``.
      signed: Whether there are negative ones.
      key: Of stochastic rounding.
    """
    groups = _rows_last(scales)
    absmax = scaling.absmax_scales(groups, "block", GROUP)
    spread: Any = scaling.expand_scales(absmax, "block", GROUP, groups.shape)
    normalized = scaling.divide(groups, spread)
    values = _values(signed)
    if key is None:
        codes = rounding.nearest_codes(normalized, values)
    else:
        noise = random_bits.uniform(key, *random_bits.element_indices(groups.shape))
        codes = rounding.stochastic_codes(normalized, values, noise)
    zero = values.index(0.0)
    nonzero = jnp.where(groups < 0, zero - 1, zero + 1).astype(jnp.uint8)
    codes = jnp.where((codes == zero) & (groups != 0), nonzero, codes)
    return CodedScales(_rows_last(codes), jax.tree.map(_rows_last, absmax))


def float_scales(coded: CodedScales, signed: bool) -> jax.Array:
    """The float32 scales."""
    codes, absmax = _rows_last(coded.codes), _rows_last(coded.absmax)
    spread: Any = scaling.expand_scales(absmax, "block", GROUP, codes.shape)
    return _rows_last(rounding.code_values(codes, _values(signed)) * spread)


def coded_shapes(shape: tuple[int, ...]) -> CodedScales:
    """The :class:`CodedScales` of `jax.ShapeDtypeStruct` of scales of ``shape``."""
    axis = max(len(shape) - 2, 0)
    groups = tuple(-(-size // GROUP) if i == axis else size for i, size in enumerate(shape))
    like: Any = jax.ShapeDtypeStruct
    return CodedScales(like(shape, jnp.uint8), like(groups, jnp.float32))


def _rows_last(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2) if x.ndim > 1 else x


def _values(signed: bool) -> tuple[float, ...]:
    table: np.ndarray = codebooks.codebook("dynamic_exponent", 8, signed)
    return tuple(table.tolist())
