"""How a leaf is cut into tiles, one for each program, and how a tile is read and written.

A tile is some rows by the codes of one packing group along the last axis, held as two halves:
nibbles are packed by halves of a group, so the low nibbles of a row of bytes are its first half and
the high nibbles its second. Everything is addressed by index in the flattened arrays and masked, so
that a leaf may have any shape: the last group of a row may be narrower than the others, and its
halves with it.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Launch configuration. Four warps with four neighbouring elements of each half to a thread: a
# thread reads 16 bytes of a float32 gradient and 4 bytes of codes at a time.
THREADS_PER_WARP = 32
MOST_WARPS = 16
ELEMENTS_PER_THREAD = 4
ELEMENTS_PER_TILE = 512  # in each half

Pair = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class Tile:
    """Where the tile of one program lies; int32 and bool arrays, masks None where all is inside."""

    # Of each half: index in the flattened leaf (rows, lanes), what is inside of the leaf, what is
    # inside of a row (1 or rows, lanes), and index in a flattened (batch, n) (1 or rows, lanes).
    elements: Pair
    element_masks: Pair
    lane_masks: Pair
    columns: Pair
    # Of packed bytes (rows, lanes).
    bytes: jax.Array
    # Of rows of the leaf, and of groups (rows, 1).
    rows: jax.Array
    groups: jax.Array
    row_mask: jax.Array | None

    def load(self, ref: Any) -> Pair:
        """Both halves of an array of the leaf's shape, in its dtype."""
        low, high = zip(self.elements, self.element_masks)
        return load(ref, *low), load(ref, *high)

    def store(self, ref: Any, halves: Pair) -> None:
        """Writes both halves of an array of the leaf's shape, rounded to its dtype."""
        for index, half, mask in zip(self.elements, halves, self.element_masks):
            store(ref, index, half, mask)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A leaf seen as ``(batch, rows, n)``, its last axis in groups of ``group`` elements.

    Tiles either follow the order of memory, whatever rows that takes them through
    (:func:`flat_tiling`), or take one group of several rows (:func:`column_tiling`), where rows and
    columns have numbers of their own to be shared.
    """

    batch: int
    rows: int
    n: int
    group: int
    by_columns: bool
    # Tiles by columns that a program takes, one after another.
    turns: int = 1

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return -(-self.n // self.group)

    @property
    def lanes(self) -> int:
        """Elements of half a group, up to a power of two."""
        return pl.next_power_of_2(-(-min(self.group, self.n) // 2))

    @property
    def tile_rows(self) -> int:
        """Rows of a tile: a power of two, and no fewer than keep every thread of a warp busy."""
        rows = self.rows if self.by_columns else self.rows * self.groups
        most = max(1, ELEMENTS_PER_TILE // self.lanes)
        # Threads with a copy of another's element might read a moment's codes after that other has
        # written the new ones.
        least = max(1, THREADS_PER_WARP // self.lanes)
        return min(most, max(least, pl.next_power_of_2(rows)))

    @property
    def warps(self) -> int:
        """Warps of a program."""
        warps = self.tile_rows * self.lanes // (THREADS_PER_WARP * ELEMENTS_PER_THREAD)
        return min(MOST_WARPS, max(1, warps))

    @property
    def row_tiles(self) -> int:
        """Tiles along the rows, of one group if tiles go by columns."""
        rows = self.rows if self.by_columns else self.rows * self.groups
        return -(-rows // self.tile_rows)

    @property
    def grid(self) -> tuple[int, ...]:
        """Programs; those next to each other in memory follow each other."""
        if self.by_columns:
            return self.groups, -(-self.row_tiles // self.turns), self.batch
        return (self.row_tiles,)

    def program(self) -> tuple[jax.Array, ...]:
        """This program's place in the grid; not to be asked for in a loop."""
        return tuple(pl.program_id(axis) for axis in range(len(self.grid)))

    def tile(self, program: tuple[jax.Array, ...], turn: Any = 0) -> Tile:
        """The tile that a program takes in a turn."""
        if self.by_columns:
            group, row_tiles, batch = program
            row_tile = row_tiles * self.turns + turn
            row = row_tile * self.tile_rows + _arange(self.tile_rows)[:, None]
            row_mask = row < self.rows if self.rows % (self.tile_rows * self.turns) else None
            return self._tile_at(batch, batch * self.rows + row, group, row_mask)
        index = program[0] * self.tile_rows + _arange(self.tile_rows)[:, None]
        total = self.rows * self.groups
        row_mask = index < total if total % self.tile_rows else None
        if self.groups == 1:
            return self._tile_at(0, index, 0, row_mask)
        return self._tile_at(0, index // self.groups, index % self.groups, row_mask)

    def _tile_at(self, batch: Any, rows: jax.Array, group: Any, row_mask: jax.Array | None) -> Tile:
        """``rows``: (rows, 1); ``group``: number of the group in its row, () or (rows, 1)."""
        lane = _arange(self.lanes)[None, :]
        start = group * self.group
        width: Any = min(self.group, self.n)
        if self.n % self.group and self.groups > 1:
            width = jnp.minimum(self.group, self.n - start)
        half = (width + 1) // 2
        low, high = start + lane, start + half + lane
        lane_masks = _below(lane, half, self.lanes), _below(lane, width - half, self.lanes)
        row_bytes = -(-self.n // 2)
        return Tile(
            elements=(rows * self.n + low, rows * self.n + high),
            element_masks=(both(row_mask, lane_masks[0]), both(row_mask, lane_masks[1])),
            lane_masks=lane_masks,
            columns=(batch * self.n + low, batch * self.n + high),
            bytes=rows * row_bytes + group * (self.group // 2) + lane,
            rows=rows,
            groups=rows * self.groups + group,
            row_mask=row_mask,
        )


def flat_tiling(shape: tuple[int, ...], group: int) -> Tiling:
    """Tiles in the order of memory, for scales that belong to groups."""
    n = shape[-1]
    rows = math.prod(shape[:-1])
    if n % group == 0:
        # No division by the number of groups in a row, and no masks.
        return Tiling(1, rows * (n // group), group, group, by_columns=False)
    return Tiling(1, rows, n, group, by_columns=False)


def column_tiling(shape: tuple[int, ...], group: int) -> Tiling:
    """Tiles of one group of columns, for scales that belong to rows and to columns."""
    return Tiling(math.prod(shape[:-2]), shape[-2], shape[-1], group, by_columns=True)


def load(ref: Any, index: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Elements of a flattened array, 0 where the mask is false."""
    if mask is None:
        return triton.load(ref.at[index])
    mask = jnp.broadcast_to(mask, index.shape)
    return triton.load(ref.at[index], mask=mask, other=jnp.zeros(index.shape, ref.dtype))


def store(ref: Any, index: jax.Array, values: jax.Array, mask: jax.Array | None) -> None:
    """Writes elements of a flattened array, in its dtype, where the mask is true."""
    values = jnp.broadcast_to(values.astype(ref.dtype), index.shape)
    if mask is not None:
        mask = jnp.broadcast_to(mask, index.shape)
    triton.store(ref.at[index], values, mask=mask)


def both(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    """Where two masks are true, either of which may be None."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def _arange(n: int) -> jax.Array:
    return jax.lax.iota(jnp.int32, n)


def _below(lane: jax.Array, end: Any, lanes: int) -> jax.Array | None:
    return None if isinstance(end, int) and end == lanes else lane < end
