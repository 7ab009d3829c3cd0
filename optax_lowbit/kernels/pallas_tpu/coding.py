"""Codes in registers: bytes to codes to values, and back, for a chunk of a leaf.

Everything here is exact: values come out of the table, and codes are what
:mod:`optax_lowbit.quant.rounding` defines. Lanes are moved by rotations, of which a full 4-bit
block needs one in each direction.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from optax_lowbit.kernels.pallas_tpu.geometry import CHUNK_COLUMNS, LANES, Chunk
from optax_lowbit.quant import QuantSpec, codebooks, rounding

_PIECES = CHUNK_COLUMNS // LANES


def unpack(packed: jax.Array, spec: QuantSpec, chunk: Chunk) -> jax.Array:
    """The codes of a chunk, int32 ``(rows, 256)``, from its bytes, int32; garbage beyond the leaf.

    Byte ``i`` of a block has code ``i`` in its low nibble and code ``i + half`` in its high one,
    where ``half`` is half of the block, or of what there is of the last one.
    """
    if spec.bits == 8:
        return packed
    pieces = []
    for piece in range(_PIECES):
        first, half = _block_of(piece, spec.block_size, chunk.valid)
        low = _rotate(packed, -(first // 2)) & 15
        high = _rotate(packed, half - first // 2) >> 4
        pieces.append(_select_lanes(half - (piece * LANES - first), low, high))
    return jnp.concatenate(pieces, axis=1)


def pack(codes: jax.Array, spec: QuantSpec, chunk: Chunk) -> jax.Array:
    """The inverse of :func:`unpack`; what is left over of the last byte is 0."""
    if spec.bits == 8:
        return codes
    if chunk.valid % 2:
        codes = chunk.without_rest(codes)
    pieces = [codes[:, piece * LANES : (piece + 1) * LANES] for piece in range(_PIECES)]
    if spec.block_size == CHUNK_COLUMNS:
        _, half = _block_of(0, spec.block_size, chunk.valid)
        low, high = pieces[0], [_rotate(piece, -half) for piece in pieces]
        return low | _select_lanes(LANES - half, *high) << 4
    packed = []
    for piece, x in enumerate(pieces):
        first, half = _block_of(piece, spec.block_size, chunk.valid)
        packed.append(_rotate(x, first // 2) | _rotate(x, first // 2 - half) << 4)
    return _select_lanes(LANES // 2, *packed)


def _block_of(piece: int, block_size: int, valid: int) -> tuple[int, int]:
    """Where the block starts that a piece of 128 columns lies in, and half of its length."""
    first = piece * LANES // block_size * block_size
    length = valid - first if 0 < valid - first < block_size else block_size
    return first, (length + 1) // 2


def _rotate(x: jax.Array, lanes: int) -> jax.Array:
    return pltpu.roll(x, lanes % LANES, 1) if lanes % LANES else x


def _select_lanes(count: int, first: jax.Array, rest: jax.Array) -> jax.Array:
    """The first ``count`` lanes from one array, the others from another."""
    if count <= 0 or count >= LANES:
        return first if count > 0 else rest
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, first.shape, 1) < count, first, rest)


# A table of more than 16 values is handed to a kernel in rows of 128 lanes: for each of the eight
# comparisons of a binary search the boundaries that it may need, then the values themselves.
_SEARCH_STEPS = 8
_VALUE_ROWS = slice(_SEARCH_STEPS, _SEARCH_STEPS + 2)
TABLE_SHAPE = (16, LANES)


def needs_table(spec: QuantSpec) -> bool:
    """Whether the kernel's operands must include :func:`table`."""
    return len(spec.values) > 16


def table(spec: QuantSpec) -> np.ndarray:
    """The table of a spec with more than 16 values: float32 of :data:`TABLE_SHAPE`."""
    values, boundaries, _ = codebooks.decision_table(spec.values)
    rows = np.full(TABLE_SHAPE, np.inf, np.float32)
    for step, candidates in enumerate(_search_tree(boundaries, _SEARCH_STEPS)):
        rows[step, : candidates.size] = candidates
    rows[_VALUE_ROWS].reshape(-1)[: values.size] = values
    return rows


def values_of(codes: jax.Array, spec: QuantSpec, table_ref) -> jax.Array:
    """The float32 table values of int32 codes."""
    if table_ref is None:
        return rounding.code_values(codes, spec.values)

    def lookup(piece):
        low, high = (_take(table_ref, row, piece & (LANES - 1)) for row in (8, 9))
        return jnp.where(piece < LANES, low, high)

    return _by_pieces(lookup, codes)


def nearest_codes(x: jax.Array, spec: QuantSpec, table_ref) -> jax.Array:
    """:func:`rounding.nearest_codes` for a sorted table: int32 codes, by binary search.

    As the boundaries ascend, counting those below ``x`` and searching for ``x`` agree; NaN is above
    none of them in either.
    """
    if table_ref is not None:
        return _by_pieces(lambda piece: _search_in_table(piece, table_ref), x)
    boundaries = codebooks.decision_table(spec.values).boundaries
    above: list[jax.Array] = []
    code = jnp.zeros(x.shape, jnp.int32)
    for candidates in _search_tree(boundaries, 4):
        above.append(x > _select(above, candidates))
        code = code * 2 + above[-1].astype(jnp.int32)
    return code


def _search_in_table(x: jax.Array, table_ref) -> jax.Array:
    code = jnp.zeros(x.shape, jnp.int32)
    for step in range(_SEARCH_STEPS):
        code = code * 2 + (x > _take(table_ref, step, code)).astype(jnp.int32)
    return code


def _search_tree(boundaries: np.ndarray, steps: int) -> list[np.ndarray]:
    """For each step of a binary search the boundaries to compare with, by the bits found so far."""
    padded = np.full(2**steps - 1, np.inf, np.float32)
    padded[: boundaries.size] = boundaries
    strides = [2 ** (steps - 1 - step) for step in range(steps)]
    return [padded[stride - 1 :: 2 * stride] for stride in strides]


def _select(masks: list[jax.Array], candidates: np.ndarray):
    """``candidates[i]``, the bits of ``i`` being ``masks``, highest first."""
    if not masks:
        return candidates[0]
    half = candidates.size // 2
    high, low = _select(masks[1:], candidates[half:]), _select(masks[1:], candidates[:half])
    return jnp.where(masks[0], high, low)


def _by_pieces(f, x: jax.Array) -> jax.Array:
    """Elementwise ``f`` on 128 lanes at a time: lookups do not cross registers."""
    pieces = [f(x[:, piece * LANES : (piece + 1) * LANES]) for piece in range(_PIECES)]
    return jnp.concatenate(pieces, axis=1)


def _take(table_ref, row: int, index: jax.Array) -> jax.Array:
    wide = jnp.broadcast_to(table_ref[row : row + 1, :], index.shape)
    return jnp.take_along_axis(wide, index, axis=1, mode="promise_in_bounds")
