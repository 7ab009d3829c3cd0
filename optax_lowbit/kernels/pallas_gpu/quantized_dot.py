"""Products with a matrix in four bits that is decoded in registers, a tile at a time.

A tile of bytes holds two tiles of values, of its low and of its high nibbles. Each has a product of
its own, with the columns of ``x``, or for the columns of the result, that it stands for: these are
addressed by index, and the bytes are read as they are stored.

References:
  Dettmers et al, `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, Section 3.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from optax_lowbit.kernels.pallas_gpu import tiles
from optax_lowbit.quant import QuantizedArray, QuantSpec

# Of a tile: rows of x, at most; rows of the matrix; and bytes of each, which are twice as many
# columns. Tensor cores take no fewer than 16 of any. As large as two programs find registers on a
# multiprocessor, in bfloat16 (compiled for an H100): the more rows of x, the less is decoded.
_BATCH = 128
_LEAST_BATCH = 16
_ROWS = 64
_BYTES = 32
_WARPS = 8
_TABLE_LENGTH = 16


def why_not_matrix(shape: tuple[int, ...], spec: QuantSpec) -> str | None:
    """Why :func:`quantized_dot` does not take a matrix ``(m, n)``, stored so; None if it does."""
    if len(shape) != 2 or shape[-1] % spec.block_size:
        return "a matrix whose rows are not whole blocks"
    if spec.bits != 4:
        return f"{spec.bits} bits"
    if spec.scaling != "block":
        return f"{spec.scaling} scales"
    return "blocks of odd size" if spec.block_size % 2 else None


def quantized_dot(
    x: jax.Array, rows: QuantizedArray, *, is_transposed: bool, interpret: bool = False
) -> jax.Array:
    """``x @ rows.T`` for ``x`` ``(batch, n)`` or, transposed, ``x @ rows`` for ``(batch, m)``.

    Args:
      x: float32 or bfloat16.
      rows: ``(m, n)``, which :func:`why_not_matrix` has nothing against, with float32 scales. Its
        values are rounded to its dtype, then to that of ``x``.
      is_transposed: Which product.
      interpret: Whether to interpret the kernel, on any platform.

    Returns:
      ``(batch, m)``, or ``(batch, n)``, in the dtype of ``x``; summed up in float32.
    """
    (m, n), batch = rows.shape, x.shape[0]
    tile_batch = min(_BATCH, max(_LEAST_BATCH, pl.next_power_of_2(batch)))
    # First in the grid, so that programs beside each other read the same rows of x.
    kept = pl.cdiv(n // 2, _BYTES) if is_transposed else pl.cdiv(m, _ROWS)
    table = np.zeros(_TABLE_LENGTH, np.float32)
    table[: len(rows.spec.values)] = rows.spec.values
    kernel = _transposed_kernel if is_transposed else _forward_kernel
    return pl.pallas_call(
        functools.partial(kernel, tile_batch=tile_batch, matrix=_Matrix(rows)),
        out_shape=jax.ShapeDtypeStruct(
            (batch, n if is_transposed else m),
            x.dtype,
            manual_axis_type=jax.typeof(x).manual_axis_type,
        ),
        grid=(kept, pl.cdiv(batch, tile_batch)),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=2),
        interpret=interpret,
        name="_quantized_dot_kernel",
    )(x, rows.codes, rows.scales, jnp.asarray(table))


class _Matrix:
    """Reads tiles of a matrix, ``(m, n)``."""

    def __init__(self, rows: QuantizedArray):
        self.m, self.n = rows.shape
        self.block, self.dtype = rows.spec.block_size, rows.dtype

    def columns(self, byte: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Those of the low and of the high nibbles of bytes in a row."""
        half = self.block // 2
        low = byte + byte // half * half
        return low, low + half

    def load(self, codes: Any, scales: Any, table: Any, row: jax.Array, byte: jax.Array):
        """Values of low and of high nibbles, ``(rows, bytes)``, rounded; 0 beyond the matrix."""
        row, byte = row[:, None], byte[None, :]
        mask = tiles.both(_below(row, self.m, _ROWS), _below(byte, self.n // 2, _BYTES))
        packed = _load(codes, row, byte, mask).astype(jnp.int32)
        scale = _load(scales, row, byte // (self.block // 2), mask)
        for nibble in (packed & 15, packed >> 4):
            yield (tiles.load(table, nibble, None) * scale).astype(self.dtype)


def _forward_kernel(x, codes, scales, table, y, *, tile_batch: int, matrix: _Matrix):
    tile, batch_tile = pl.program_id(0), pl.program_id(1)
    row = tile * _ROWS + _arange(_ROWS)
    number = batch_tile * tile_batch + _arange(tile_batch)
    in_batch = _below(number[:, None], x.shape[0], tile_batch)

    def add(turn, sums):
        byte = turn * _BYTES + _arange(_BYTES)
        values = matrix.load(codes, scales, table, row, byte)
        mask = tiles.both(in_batch, _below(byte[None, :], matrix.n // 2, _BYTES))
        for column, value in zip(matrix.columns(byte), values):
            part = _load(x, number[:, None], column[None, :], mask)
            sums += _dot(part, value.astype(x.dtype), 1)
        return sums

    turns = pl.cdiv(matrix.n // 2, _BYTES)
    sums = jax.lax.fori_loop(0, turns, add, jnp.zeros((tile_batch, _ROWS), jnp.float32))
    mask = tiles.both(in_batch, _below(row[None, :], matrix.m, _ROWS))
    _store(y, number[:, None], row[None, :], sums, mask)


def _transposed_kernel(g, codes, scales, table, dx, *, tile_batch: int, matrix: _Matrix):
    tile, batch_tile = pl.program_id(0), pl.program_id(1)
    byte = tile * _BYTES + _arange(_BYTES)
    number = batch_tile * tile_batch + _arange(tile_batch)
    in_batch = _below(number[:, None], g.shape[0], tile_batch)

    def add(turn, sums):
        row = turn * _ROWS + _arange(_ROWS)
        mask = tiles.both(in_batch, _below(row[None, :], matrix.m, _ROWS))
        part = _load(g, number[:, None], row[None, :], mask)
        values = matrix.load(codes, scales, table, row, byte)
        return [s + _dot(part, value.astype(g.dtype), 0) for s, value in zip(sums, values)]

    zeros = jnp.zeros((tile_batch, _BYTES), jnp.float32)
    halves = jax.lax.fori_loop(0, pl.cdiv(matrix.m, _ROWS), add, [zeros, zeros])
    mask = tiles.both(in_batch, _below(byte[None, :], matrix.n // 2, _BYTES))
    for column, sums in zip(matrix.columns(byte), halves):
        _store(dx, number[:, None], column[None, :], sums, mask)


def _dot(a: jax.Array, b: jax.Array, contracted: int) -> jax.Array:
    dimensions = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _load(ref: Any, row: jax.Array, column: jax.Array, mask: jax.Array | None) -> jax.Array:
    shape = jnp.broadcast_shapes(row.shape, column.shape)
    index = jnp.broadcast_to(row, shape), jnp.broadcast_to(column, shape)
    if mask is None:
        return triton.load(ref.at[index])
    zeros = jnp.zeros(shape, ref.dtype)
    return triton.load(ref.at[index], mask=jnp.broadcast_to(mask, shape), other=zeros)


def _store(ref: Any, row: jax.Array, column: jax.Array, values: jax.Array, mask: Any) -> None:
    index = jnp.broadcast_to(row, values.shape), jnp.broadcast_to(column, values.shape)
    if mask is not None:
        mask = jnp.broadcast_to(mask, values.shape)
    triton.store(ref.at[index], values.astype(ref.dtype), mask=mask)


def _below(index: jax.Array, end: int, tile: int) -> jax.Array | None:
    """Whether indices are below ``end``; None where whole tiles are."""
    return None if end % tile == 0 else index < end


def _arange(n: int) -> jax.Array:
    return jax.lax.iota(jnp.int32, n)
