"""Cutting a leaf into tiles, so that a step never holds more than a tile of it in float32.

XLA keeps the float32 moments of every leaf of a tree at once (8 bytes a parameter), whatever the
order of the program and whatever barriers stand in it. A loop with its state updated in place is
what bounds them.

A tile must not cross shards, or every turn of the loop would gather the leaf. Where an axis can be
sharded ``g`` ways it is therefore seen as ``(g, n / g)`` and cut along the second part: a tile
takes a piece of each shard. The result does not depend on that: rounding sees elements and blocks.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

# Elements of a tile on each device. Small enough that some float32 temporaries of this size are
# 1 MiB, large enough that the loop's own cost does not show (1 to 2 per cent on a CPU).
TILE_ELEMENTS = 2**15


@dataclasses.dataclass(frozen=True)
class _Axis:
    size: int  # elements
    unit: int  # elements that may not be parted
    shards: int  # equal parts, each of which is cut the same way
    length: int  # units of a tile in each part; 0 if the axis is not cut

    @property
    def turns(self) -> int:
        """Tiles of full length along the axis."""
        return self.size // self.shards // self.unit // self.length if self.length else 1

    @property
    def has_rest(self) -> bool:
        """Whether the full tiles leave something over."""
        full = self.turns * self.length * self.unit * self.shards
        return bool(self.length) and full < self.size


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tile lies along one axis: the units before it, and its own (None: all the rest)."""

    start: jax.Array | int
    length: int | None


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile of a leaf: reads and writes it in any array laid out like the leaf."""

    axes: tuple[_Axis, ...]
    places: tuple[_Place, ...]

    def read(self, view: jax.Array) -> jax.Array:
        """The tile of an array given as :meth:`Tiling.view`."""
        starts, sizes = self._window(view)
        return _merged(jax.lax.dynamic_slice(view, starts, sizes), _split_axes(self.axes, view))

    def write(self, view: jax.Array, tile: jax.Array) -> jax.Array:
        """``view`` with the tile in its place."""
        starts, _ = self._window(view)
        return jax.lax.dynamic_update_slice(view, _split(tile, self.axes), starts)

    def indices(self) -> tuple[jax.Array, jax.Array]:
        """Row (over all leading axes) and column in the leaf of each element, uint32."""
        along = []
        for axis, place in zip(self.axes, self.places):
            part = axis.size // axis.shards
            start, size = _extent(axis, place, part)
            within = jnp.arange(size, dtype=jnp.uint32) + jnp.asarray(start).astype(jnp.uint32)
            shard = jnp.arange(axis.shards, dtype=jnp.uint32) * jnp.uint32(part)
            along.append((shard[:, None] + within[None, :]).reshape(-1))
        shape = tuple(index.size for index in along)
        spread = [
            jax.lax.broadcast_in_dim(index, shape, (axis,)) for axis, index in enumerate(along)
        ]
        row = jnp.zeros(shape, jnp.uint32)
        for axis, index in zip(self.axes[:-1], spread[:-1]):
            row = row * jnp.uint32(axis.size) + index
        return row, spread[-1]

    def _window(self, view: jax.Array) -> tuple[list[Any], list[int]]:
        starts, sizes = [], []
        dimensions = iter(view.shape)
        for axis, place, is_split in zip(self.axes, self.places, _split_axes(self.axes, view)):
            if is_split:
                shards = next(dimensions)
                starts.append(0)
                sizes.append(shards)
            part = next(dimensions)
            start, size = _extent(axis, place, part)
            starts.append(start)
            sizes.append(size)
        return starts, sizes


def _extent(axis: _Axis, place: _Place, part: int) -> tuple[jax.Array | int, int]:
    """First element and number of elements along one axis of an array with ``part`` per shard."""
    if not axis.length or part == 1:
        return 0, part
    # Codes and scales have fewer elements in a unit than the leaf has.
    unit = part * axis.unit * axis.shards // axis.size
    if place.length is None:
        start = int(place.start) * unit
        return start, part - start
    return place.start * unit, place.length * unit


def _split_axes(axes: tuple[_Axis, ...], view: jax.Array) -> list[bool]:
    """Which axes of a leaf are two dimensions of a view; an axis of size 1 never is."""
    flags, dimension = [], 0
    for axis in axes:
        split = axis.shards > 1 and view.shape[dimension] != 1
        flags.append(split)
        dimension += 1 + split
    return flags


# One axis at a time: the most that reshape understands of a sharding that is part of the type.
def _split(x: jax.Array, axes: tuple[_Axis, ...]) -> jax.Array:
    """Axes with shards, but those of size 1, as two dimensions."""
    dimension = 0
    for axis in axes:
        if axis.shards > 1 and x.shape[dimension] != 1:
            parts = [axis.shards, x.shape[dimension] // axis.shards]
            x = x.reshape(*x.shape[:dimension], *parts, *x.shape[dimension + 1 :])
            dimension += 1
        dimension += 1
    return x


def _merged(x: jax.Array, is_split: list[bool]) -> jax.Array:
    """The inverse of :func:`_split`."""
    for dimension, split in enumerate(is_split):
        if split:
            x = x.reshape(*x.shape[:dimension], -1, *x.shape[dimension + 2 :])
    return x


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a leaf is cut into tiles."""

    axes: tuple[_Axis, ...]

    def view(self, x: jax.Array) -> jax.Array:
        """An array laid out like the leaf, with its sharded axes in two parts."""
        return _split(x, self.axes)

    def unview(self, view: jax.Array) -> jax.Array:
        """The inverse of :meth:`view`."""
        return _merged(view, _split_axes(self.axes, view))

    def regions(self) -> Iterator[tuple[int, Callable[[Any], Tile]]]:
        """Groups of equal tiles: how many, and the tile of a number below that."""
        kinds = [(True, False) if axis.has_rest else (True,) for axis in self.axes]
        for kind in itertools.product(*kinds):
            turns = [axis.turns if full else 1 for axis, full in zip(self.axes, kind)]
            if math.prod(turns):
                yield math.prod(turns), lambda i, kind=kind, turns=turns: self._tile(i, kind, turns)

    def _tile(self, number: jax.Array | int, kind: tuple[bool, ...], turns: list[int]) -> Tile:
        places = []
        for axis, full, count in reversed(list(zip(self.axes, kind, turns))):
            turn = number % count if count > 1 else 0
            number = number // count
            if full:
                places.append(_Place(turn * axis.length, axis.length))
            else:
                places.append(_Place(axis.turns * axis.length, None))
        return Tile(self.axes, tuple(reversed(places)))


def plan_tiles(
    shape: tuple[int, ...],
    unit: int,
    shards: tuple[int, ...],
    tile_elements: int = TILE_ELEMENTS,
) -> Tiling | None:
    """A tiling of a leaf, or None if it is small enough to be one tile.

    Args:
      shape: The leaf's global shape.
      unit: Elements along the last axis that share a scale or bytes, and so stay together.
      shards: Devices that each axis may be spread over.
      tile_elements: Elements of a tile on each device.
    """
    units = [1] * (len(shape) - 1) + [unit]
    kept = [
        math.gcd(size // u, parts) if size % u == 0 else 1
        for size, u, parts in zip(shape, units, shards)
    ]
    elements = tile_elements * max(shards, default=1)
    if math.prod(shape) <= elements:
        return None
    budget = max(elements // math.prod(kept) // unit, 1)
    axes = []
    for size, u, parts in reversed(list(zip(shape, units, kept))):
        count = size // parts // u
        length = _tile_length(count, budget)
        axes.append(_Axis(size, u, parts, length if length < count else 0))
        budget = max(budget // max(length, 1), 1)
    if not any(axis.length for axis in axes):
        return None
    return Tiling(tuple(reversed(axes)))


def over_tiles(
    tiling: Tiling,
    body: Callable[[Tile, Any, Any], Any],
    constants: Any,
    carry: Any,
    *,
    pack: Callable[[Any], Any] = lambda tiles: tiles,
    unpack: Callable[[Any], Any] = lambda tiles: tiles,
) -> Any:
    """Runs ``body(tile, constants, carry) -> results`` on every tile, the carry updated in place.

    Args:
      tiling: From :func:`plan_tiles`.
      body: Gets the tile and its parts of all arrays; ``pack`` of what it gives becomes the new
        part of the carry.
      constants: Pytree of arrays laid out like the leaf: of its rank, each axis as long as the
        leaf's, in proportion to it (codes, block scales), or 1.
      carry: The same.
      pack: What is left to do until the results can be written: slices and shifts, no arithmetic.
      unpack: Its inverse.

    Returns:
      The new carry.
    """
    dtypes = jax.tree.map(lambda x: x.dtype, (constants, carry))

    def read(tile, views, dtypes):
        return jax.tree.map(lambda view, dtype: from_bits(tile.read(view), dtype), views, dtypes)

    constants, views = jax.tree.map(lambda x: tiling.view(as_bits(x)), (constants, carry))
    for count, tile_at in tiling.regions():
        # Each turn first writes what the one before has computed. So all that is written comes out
        # of a buffer of the loop, and is read after the write: XLA then neither fuses arithmetic
        # into packing and the in-place write, where it does not vectorize, nor copies the array to
        # be safe. The first turn writes back what is there already; what the last one computes is
        # not used.
        def turn(i, state, tile_at=tile_at, count=count):
            views, results = state
            before = tile_at((i + count - 1) % count)
            views = jax.tree.map(
                lambda view, tile: before.write(view, as_bits(tile)), views, pack(results)
            )
            tile = tile_at(i % count)
            return views, body(tile, read(tile, constants, dtypes[0]), read(tile, views, dtypes[1]))

        state = views, unpack(read(tile_at(count - 1), views, dtypes[1]))
        views, _ = jax.lax.fori_loop(0, count + 1, turn, state)
    return jax.tree.map(lambda view, dtype: from_bits(tiling.unview(view), dtype), views, dtypes[1])


def as_bits(x: jax.Array) -> jax.Array:
    """``x``, a bfloat16 array as uint16: a CPU widens all of it, in every turn, to slice it."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(bits: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of :func:`as_bits` for an array of that dtype."""
    return jax.lax.bitcast_convert_type(bits, dtype) if dtype == jnp.bfloat16 else bits


def _tile_length(count: int, budget: int) -> int:
    """Units of a tile: a divisor of ``count`` if one is near the budget, so that none is left."""
    if count <= budget:
        return count
    for length in range(budget, budget // 2, -1):
        if count % length == 0:
            return length
    return budget
