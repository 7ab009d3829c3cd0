"""What kernels read and write.

An operand says which arrays it brings, how they are cut into tiles, which of them are written in
place, and what a kernel's body sees of it: an object with ``read(chunk)`` and ``write(chunk, x)``,
float32 in both.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from optax_lowbit.kernels.pallas_tpu import coding
from optax_lowbit.kernels.pallas_tpu.chunks import Buffer, Operand, Refs, View
from optax_lowbit.kernels.pallas_tpu.geometry import (
    CHUNK_COLUMNS,
    CHUNK_ROWS,
    LANES,
    TILE_ROWS,
    Chunk,
    Grid,
)
from optax_lowbit.quant import QuantSpec
from optax_lowbit.quant.scaling import absmax, divide


def like(x: jax.Array, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """The shape of an array as that of a result."""
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)


def scalars(values: Sequence[jax.Array]) -> Operand:
    """Float32 scalars; the body sees a list of them."""
    packed = jnp.stack([jnp.asarray(value, jnp.float32) for value in values])
    buffer = Buffer(pl.BlockSpec(memory_space=pltpu.SMEM), packed)
    return Operand((buffer,), lambda refs: _Scalars(refs, len(values)))


class _Scalars(View):
    def __init__(self, refs: Refs, count: int):
        self.refs, self.count = refs, count

    def read(self) -> list[jax.Array]:
        return [self.refs.source[i] for i in range(self.count)]


def elements(
    grid: Grid, source: jax.Array | None, target: jax.ShapeDtypeStruct | None = None
) -> Operand:
    """Floats, one for each element of the leaf."""
    return Operand((Buffer(grid.elements(), source, target),), _Elements)


class _Elements(View):
    def __init__(self, refs: Refs):
        self.refs = refs

    def read(self, chunk: Chunk) -> jax.Array:
        return self.refs.source[chunk.rows, chunk.columns()].astype(jnp.float32)

    def write(self, chunk: Chunk, x: jax.Array) -> None:
        self.refs.target[chunk.rows, chunk.columns()] = x.astype(self.refs.target.dtype)


def gradient(grid: Grid, grad: jax.Array, descent: Any) -> Operand:
    """The gradient, where an update is written over it, or new parameters over the old ones.

    Args:
      grid: The leaf's.
      grad: The gradient, of the grid's shape.
      descent: None, or parameters of that shape, learning rate and weight decay.
    """
    if descent is None:
        return elements(grid, grad, like(grad))
    params, *rates = descent
    parts = [elements(grid, grad), elements(grid, params, like(params)), scalars(rates)]
    return Operand(tuple(part.buffers[0] for part in parts), _Descending)


class _Descending(View):
    def __init__(self, grad: Refs, params: Refs, rates: Refs):
        self.grad, self.params, self.rates = _Elements(grad), _Elements(params), rates

    def read(self, chunk: Chunk) -> jax.Array:
        return self.grad.read(chunk)

    def write(self, chunk: Chunk, update: jax.Array) -> None:
        learning_rate, weight_decay = self.rates.source[0], self.rates.source[1]
        params = self.params.read(chunk)
        self.params.write(chunk, params + -learning_rate * (update + weight_decay * params))


# What is kept for each row of a tile, turned so that rows are sublanes.
_PER_ROW = pltpu.VMEM((TILE_ROWS, 1), jnp.float32)


class Factors(NamedTuple):
    """Float32 numbers for each row and each column of a leaf, as a kernel takes them."""

    rows: jax.Array  # (batch, 1, rows)
    columns: jax.Array  # (batch, 1, columns)


def outer(grid: Grid, combine: Callable[..., jax.Array], factors: Factors) -> Operand:
    """``combine`` of an element's row's and its column's number."""
    buffers = Buffer(grid.per_row(), factors.rows), Buffer(grid.per_column(), factors.columns)
    return Operand(buffers, lambda *refs: _Outer(combine, *refs), (_PER_ROW,))


class _Outer(View):
    def __init__(self, combine: Callable[..., jax.Array], rows: Refs, columns: Refs, scratch):
        self.combine, self.rows, self.columns, self.scratch = combine, rows, columns, scratch

    def start(self) -> None:
        self.scratch[...] = self.rows.source[...].T

    def read(self, chunk: Chunk) -> jax.Array:
        return self.combine(self.scratch[chunk.rows, :], self.columns.source[:, chunk.columns()])


class Stored(NamedTuple):
    """The arrays of a low-bit moment, or of one that is to be written, as a kernel takes them."""

    codes: Any  # (batch, rows, bytes)
    scales: Any = None  # (batch, blocks, rows), where they are block scales


def block_scaled(
    grid: Grid, spec: QuantSpec, source: Stored | None, target: Stored | None
) -> Operand:
    """A moment with block scales, which are computed from what is written."""
    given, made = source or Stored(None), target or Stored(None)
    scales = Buffer(grid.block_scales(spec.block_size), given.scales, made.scales)
    # A block's scales by themselves, as the block's number is not static, which lanes have to be.
    scratch = pltpu.VMEM((grid.width // spec.block_size, TILE_ROWS, 1), jnp.float32)
    return Operand(
        (
            Buffer(grid.elements(spec.bits), given.codes, made.codes),
            scales,
            *_tables(spec),
        ),
        lambda codes, scales, *rest: _BlockScaled(spec, codes, scales, *rest),
        (scratch,),
    )


class _BlockScaled(View):
    """The scales of a tile lie in ``columns``; writing a chunk overwrites its own."""

    def __init__(self, spec: QuantSpec, codes: Refs, scales: Refs, *table_and_columns):
        *table, self.columns = table_and_columns
        self.codes, self.scales = _Codes(spec, codes, *table), scales
        self.block_size = spec.block_size

    def start(self) -> None:
        if self.scales.source is not None:
            by_row = self.scales.source[...].T
            for block in range(self.columns.shape[0]):
                self.columns[block] = by_row[:, block : block + 1]

    def finish(self) -> None:
        if self.scales.target is not None:
            blocks = [self.columns[block] for block in range(self.columns.shape[0])]
            self.scales.target[...] = jnp.concatenate(blocks, axis=1).T

    def read(self, chunk: Chunk) -> jax.Array:
        scales = [self.columns[block, chunk.rows, :] for block in self._blocks(chunk)]
        return self.codes.read(chunk) * self._wide(scales)

    def write(self, chunk: Chunk, x: jax.Array) -> None:
        size = self.block_size
        known = chunk.without_rest(x) if chunk.valid % size else x
        scales = [
            absmax(known[:, first : first + size], axis=(1,))
            for first in range(0, CHUNK_COLUMNS, size)
        ]
        for block, scale in zip(self._blocks(chunk), scales):
            self.columns[block, chunk.rows, :] = scale
        self.codes.write(chunk, x, self._wide(scales))

    def _blocks(self, chunk: Chunk) -> list[Any]:
        count = CHUNK_COLUMNS // self.block_size
        return [chunk.number * count + i for i in range(count)]

    def _wide(self, scales: list[jax.Array]) -> jax.Array:
        """Scales (rows, 1) of a chunk's blocks, one for each element."""
        shape = (CHUNK_ROWS, self.block_size)
        return jnp.concatenate([jnp.broadcast_to(scale, shape) for scale in scales], axis=1)


def rank1_scaled(
    grid: Grid, spec: QuantSpec, codes: jax.Array, old: Factors, new: Factors | None = None
) -> Operand:
    """A moment read under old rank-1 scales and, if there are new ones, written under those."""
    target = None if new is None else like(codes)
    scales = [outer(grid, jnp.minimum, each) for each in (old, new) if each is not None]
    return Operand(
        (
            Buffer(grid.elements(spec.bits), codes, target),
            *(buffer for each in scales for buffer in each.buffers),
            *_tables(spec),
        ),
        lambda codes, *rest: _Rank1Scaled(spec, len(scales), codes, *rest),
        tuple(shape for each in scales for shape in each.scratch),
    )


class _Rank1Scaled(View):
    def __init__(self, spec: QuantSpec, count: int, codes: Refs, *rest):
        refs, table, scratch = rest[: 2 * count], rest[2 * count : -count], rest[-count:]
        self.codes = _Codes(spec, codes, *table)
        self.scales = [
            _Outer(jnp.minimum, rows, columns, by_row)
            for rows, columns, by_row in zip(refs[::2], refs[1::2], scratch)
        ]

    def start(self) -> None:
        for scales in self.scales:
            scales.start()

    def read(self, chunk: Chunk) -> jax.Array:
        return self.codes.read(chunk) * self.scales[0].read(chunk)

    def write(self, chunk: Chunk, x: jax.Array) -> None:
        self.codes.write(chunk, x, self.scales[1].read(chunk))


def _tables(spec: QuantSpec) -> list[Buffer]:
    if not coding.needs_table(spec):
        return []
    whole = pl.BlockSpec(coding.TABLE_SHAPE, lambda b, i, j: (0, 0))
    return [Buffer(whole, jnp.asarray(coding.table(spec)))]


class _Codes:
    def __init__(self, spec: QuantSpec, refs: Refs, table: Refs | None = None):
        self.spec, self.refs = spec, refs
        self.table = None if table is None else table.source

    def read(self, chunk: Chunk) -> jax.Array:
        """Table values, which are to be multiplied by scales."""
        packed = self.refs.source[chunk.rows, chunk.columns(self.spec.bits)].astype(jnp.int32)
        return coding.values_of(coding.unpack(packed, self.spec, chunk), self.spec, self.table)

    def write(self, chunk: Chunk, x: jax.Array, scale: jax.Array) -> None:
        nearest = coding.nearest_codes(divide(x, scale), self.spec, self.table)
        packed = coding.pack(nearest, self.spec, chunk)
        self.refs.target[chunk.rows, chunk.columns(self.spec.bits)] = packed.astype(jnp.uint8)


def maxima(grid: Grid) -> Operand:
    """Rank-1 scales of what is written: the largest magnitude of each row and of each column.

    The tiles of one batch element must be processed one after the other, row by row.
    """
    width = grid.turns[2] * grid.width
    # The maxima of all columns stay in VMEM until the last row has been seen.
    all_columns = pl.BlockSpec((None, 1, width), lambda b, i, j: (b, 0, 0))
    rows = jax.ShapeDtypeStruct((grid.batch, 1, grid.rows), jnp.float32)
    columns = jax.ShapeDtypeStruct((grid.batch, 1, grid.columns), jnp.float32)
    buffers = (Buffer(grid.per_row(), target=rows), Buffer(all_columns, target=columns))
    return Operand(buffers, lambda *refs: _Maxima(grid, *refs), (_PER_ROW,))


class _Maxima(View):
    def __init__(self, grid: Grid, rows: Refs, columns: Refs, row_maxima):
        self.grid, self.rows, self.columns, self.row_maxima = grid, rows, columns, row_maxima

    def start(self) -> None:
        # Asked for here as the interpreter knows no answer within a loop.
        self.tile_row, self.tile_column = pl.program_id(1), pl.program_id(2)

        @pl.when(self.tile_column == 0)
        def _():
            self.row_maxima[...] = jnp.zeros_like(self.row_maxima)

        @pl.when((self.tile_row == 0) & (self.tile_column == 0))
        def _():
            self.columns.target[...] = jnp.zeros_like(self.columns.target)

    def finish(self) -> None:
        @pl.when(self.tile_column == self.grid.turns[2] - 1)
        def _():
            self.rows.target[...] = self.row_maxima[...].T

    def write(self, chunk: Chunk, x: jax.Array) -> None:
        known = self._within_rows(chunk, chunk.without_rest(x))
        by_row = absmax(known, axis=(1,))
        self.row_maxima[chunk.rows, :] = jnp.maximum(self.row_maxima[chunk.rows, :], by_row)
        first = self.tile_column * self.grid.width + chunk.first_column()
        columns = pl.ds(pl.multiple_of(first, LANES), CHUNK_COLUMNS)
        by_column = absmax(known, axis=(0,))
        target = self.columns.target
        target[:, columns] = jnp.maximum(target[:, columns], by_column)

    def _within_rows(self, chunk: Chunk, x: jax.Array) -> jax.Array:
        if self.grid.rows % TILE_ROWS == 0:
            return x
        first = self.tile_row * TILE_ROWS + chunk.first_row
        row = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where(row < self.grid.rows, x, jnp.zeros_like(x))
