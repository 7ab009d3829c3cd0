"""How a leaf is cut for a TPU: a grid of tiles, and in a tile chunks that fit in registers.

A leaf is seen as (batch, rows, columns). Its block scales are handed to kernels transposed, as
(batch, blocks, rows): that is how XLA lays out an array with a short last axis, so the transpose is
free, and a tile of eight blocks by 128 rows is one register, where (128, 8) is none.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128
# Rows of a tile: those of a transposed tile of scales, which are lanes.
TILE_ROWS = LANES
# Columns of a tile, in blocks: a transposed tile of scales has eight sublanes. With blocks of 128 a
# float32 tile is 512 KiB: large enough to hide the cost of a turn of the grid, and a kernel's dozen
# of them (two for each array, to overlap copies with compute) fit in the smallest default of VMEM.
TILE_BLOCKS = 8
# Block sizes that tiles of this size are made for.
BLOCK_SIZES = (128, 256)
# A chunk is as many rows as one register of uint8 has, and as many columns as 4-bit codes in it.
CHUNK_ROWS = 32
CHUNK_COLUMNS = 2 * LANES


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What a kernel handles at a time; ``valid`` of its columns lie within the leaf."""

    first_row: jax.Array  # in the tile
    number: jax.Array | int  # along the columns of the tile
    valid: int

    @property
    def rows(self) -> Any:
        """Its rows in a tile."""
        return pl.ds(self.first_row, CHUNK_ROWS)

    def first_column(self, bits: int = 8) -> Any:
        """Its first column in a tile, or its first byte where elements have fewer than 8 bits."""
        size = CHUNK_COLUMNS * bits // 8
        return pl.multiple_of(jnp.asarray(self.number * size), size)

    def columns(self, bits: int = 8) -> Any:
        """Its columns in a tile, or its bytes where elements have fewer than 8 bits."""
        return pl.ds(self.first_column(bits), CHUNK_COLUMNS * bits // 8)

    def without_rest(self, x: jax.Array) -> jax.Array:
        """``x`` with 0 in the columns beyond the leaf, where garbage is read."""
        if self.valid == CHUNK_COLUMNS:
            return x
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where(lane < self.valid, x, jnp.zeros_like(x))


@dataclasses.dataclass(frozen=True)
class Grid:
    """The tiles of a leaf seen as (batch, rows, columns)."""

    batch: int
    rows: int
    columns: int
    width: int  # columns of a tile

    @property
    def turns(self) -> tuple[int, int, int]:
        """Tiles along each axis; those of rows and of columns may be partial."""
        return self.batch, pl.cdiv(self.rows, TILE_ROWS), pl.cdiv(self.columns, self.width)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The leaf's shape as the grid sees it."""
        return self.batch, self.rows, self.columns

    @property
    def row_chunks(self) -> int:
        """Chunks along the rows of a tile; in the last tile some may lie beyond the leaf."""
        return pl.cdiv(min(self.rows, TILE_ROWS), CHUNK_ROWS)

    @property
    def last_width(self) -> int:
        """Columns of the last tile that lie within the leaf."""
        return self.columns - (self.turns[2] - 1) * self.width

    def elements(self, bits: int = 8) -> pl.BlockSpec:
        """Tiles of an array of the leaf's shape, or of codes packed along its columns."""
        return pl.BlockSpec((None, TILE_ROWS, self.width * bits // 8), lambda b, i, j: (b, i, j))

    def block_scales(self, block_size: int) -> pl.BlockSpec:
        """Tiles of block scales, transposed."""
        return pl.BlockSpec((None, self.width // block_size, TILE_ROWS), lambda b, i, j: (b, j, i))

    def per_row(self) -> pl.BlockSpec:
        """Tiles of an array with one number for each row, transposed: (batch, 1, rows)."""
        return pl.BlockSpec((None, 1, TILE_ROWS), lambda b, i, j: (b, 0, i))

    def per_column(self) -> pl.BlockSpec:
        """Tiles of an array with one number for each column: (batch, 1, columns)."""
        return pl.BlockSpec((None, 1, self.width), lambda b, i, j: (b, 0, j))


def plan(shape: tuple[int, ...], block_sizes: tuple[int, ...], batched: bool) -> Grid:
    """The grid of a leaf with at least two axes.

    Args:
      shape: The leaf's shape.
      block_sizes: Of its moments.
      batched: Whether the last two axes must be kept apart from the leading ones because something
        is shared along each of them. Otherwise leading axes become rows where that is a view of the
        same bytes, or a matrix would fill a part of a tile only.
    """
    *lead, rows, columns = shape
    batch = math.prod(lead)
    if not batched and (rows % CHUNK_ROWS == 0 or rows < TILE_ROWS):
        batch, rows = 1, batch * rows
    return Grid(batch, rows, columns, TILE_BLOCKS * max(block_sizes))
