"""Normalized values to codes and back: nearest and stochastic rounding to a code table."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.quant import codebooks

# Up to here one comparison for each boundary beats a binary search: it vectorizes.
_MOST_COMPARISONS = 16
_MOST_SELECTS = 16


def nearest_codes(x: jax.Array, values: tuple[float, ...]) -> jax.Array:
    """Codes of the table values nearest to ``x``, float32 of any shape.

    One rule for every backend: the code's rank in the sorted table is the number of boundaries
    strictly below ``x``, the boundaries being the midpoints rounded to float32. So ties go to the
    lower value, what lies outside the table goes to its end, and NaN goes to the lowest value.
    """
    table = codebooks.decision_table(values)
    return _to_codes(_count_below(x, table.boundaries), table)


def stochastic_codes(x: jax.Array, values: tuple[float, ...], uniform: jax.Array) -> jax.Array:
    """Codes of one of the two table values around ``x``, drawn so that the mean is ``x``.

    Unbiased within the table's range; outside, ``x`` goes to its end.

    Args:
      x: float32 of any shape.
      values: The code table.
      uniform: float32 in [0, 1), of the shape of ``x``: the upper value is taken where this is
        below ``(x - lower) / (upper - lower)``.
    """
    table = codebooks.decision_table(values)
    inner_values = table.sorted_values[1:-1]
    lower = _count_at_or_below(x, inner_values)
    below = _take(table.sorted_values, lower)
    above = _take(table.sorted_values, lower + 1)
    gap = above - below
    # Repeated values (a table without zero gives up a code) leave no gap: either code will do.
    chance = jnp.where(gap > 0, (x - below) / jnp.where(gap > 0, gap, 1.0), 0.0)
    return _to_codes(lower + (uniform < chance).astype(jnp.int32), table)


def stochastic_bfloat16(x: jax.Array, noise: jax.Array) -> jax.Array:
    """One of the two bfloat16 numbers around ``x``, drawn so that the mean is ``x``.

    Args:
      x: float32 of any shape.
      noise: 16 random bits as uint32, of the shape of ``x``: they are added to the bits that
        bfloat16 lacks, and the sum is cut off.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    upper = (bits + noise >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isnan(x), x.astype(jnp.bfloat16), rounded)


def code_values(codes: jax.Array, values: tuple[float, ...]) -> jax.Array:
    """The float32 table values of uint8 ``codes``."""
    if len(values) > _MOST_SELECTS:
        return _take(np.asarray(values, np.float32), codes.astype(jnp.int32))
    # A tree of selects, one level for each bit of the code: it vectorizes, a gather does not.
    level = list(np.asarray(values, np.float32))
    bit = 0
    while len(level) > 1:
        is_set = (codes >> bit & 1) != 0
        pairs = itertools.zip_longest(level[::2], level[1::2])
        level = [low if high is None else jnp.where(is_set, high, low) for low, high in pairs]
        bit += 1
    return level[0]


def _to_codes(rank: jax.Array, table: codebooks.DecisionTable) -> jax.Array:
    if table.codes is None:
        return rank.astype(jnp.uint8)
    return _take(table.codes, rank)


def _count_at_or_below(x: jax.Array, boundaries: np.ndarray) -> jax.Array:
    # x >= b is x > the float32 just below b.
    return _count_below(x, np.nextafter(boundaries, np.float32(-np.inf)))


def _count_below(x: jax.Array, boundaries: np.ndarray) -> jax.Array:
    if boundaries.size <= _MOST_COMPARISONS:
        count = jnp.zeros(x.shape, jnp.int32)
        for boundary in boundaries:
            count = count + (x > boundary).astype(jnp.int32)
        return count
    return _binary_search(x, boundaries)


def _binary_search(x: jax.Array, boundaries: np.ndarray) -> jax.Array:
    steps = int(boundaries.size).bit_length()
    padded = np.full(2**steps - 1, np.inf, np.float32)
    padded[: boundaries.size] = boundaries
    # The first step looks at one place; as a gather of zeros XLA would fold it, slowly.
    count = (x > padded[2 ** (steps - 1) - 1]).astype(jnp.int32) * 2 ** (steps - 1)
    for step in reversed(range(steps - 1)):
        boundary = _take(padded, count + (2**step - 1))
        count = count + (x > boundary).astype(jnp.int32) * 2**step
    return count


def _take(table: np.ndarray, index: jax.Array) -> jax.Array:
    """``table[index]``, laid out as ``index`` is; an index beyond the end takes the last entry."""
    sharding = jax.typeof(index).sharding
    out_sharding = sharding if sharding.mesh.explicit_axes else None
    return jnp.asarray(table).at[index].get(mode="clip", out_sharding=out_sharding)
