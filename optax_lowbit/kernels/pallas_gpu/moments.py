"""Moments in a tile: read from codes and scales to float32, and written back.

Each way of scaling has a class with ``load``, which gives both halves of a tile in float32, and
``store``, which writes new codes, and new scales where they belong to the tile alone. Rounding is
that of :mod:`optax_lowbit.quant.rounding`, code for code: a code is the number of boundaries
strictly below ``x / scale``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton

from optax_lowbit.kernels.pallas_gpu import tiles
from optax_lowbit.kernels.pallas_gpu.tiles import Pair, Tile
from optax_lowbit.quant import QuantizedArray, QuantSpec, codebooks

Refs = Mapping[str, Any]

# In memory a code table is its values, then its boundaries, each filled up to this length. Decoding
# by a look-up takes a few instructions, a tree of selects on the bits of a code 20 more.
TABLE_LENGTH = 256
# Up to this many values, boundaries are constants of the program, chosen from by selects.
MOST_SELECTS = 16


@dataclasses.dataclass(frozen=True)
class Codec:
    """Codes of one spec, in bytes of their own or two to a byte."""

    # Arrays are found among refs by this name and a suffix.
    name: str
    spec: QuantSpec
    # Whether the kernel is interpreted, where there is no assembly to divide with.
    interpret: bool

    def table(self) -> dict[str, jax.Array]:
        """The code table as an operand, by name."""
        return {f"{self.name}_table": jnp.asarray(lookup_table(self.spec.values))}

    def operands(self, q: QuantizedArray) -> dict[str, jax.Array]:
        """What the kernel reads, by name."""
        return {f"{self.name}_codes": q.codes, **self.table()}

    def load(self, refs: Refs, tile: Tile) -> Pair:
        """Table values of the codes, float32."""
        low, high = self._load_codes(refs[f"{self.name}_codes"], tile)
        table = refs[f"{self.name}_table"]
        return tiles.load(table, low, None), tiles.load(table, high, None)

    def store(self, refs: Refs, out: Refs, tile: Tile, halves: Pair, scales: Pair) -> None:
        """Writes the codes of float32 ``halves`` under ``scales``, which broadcast to them."""
        low, high = (
            self._nearest_codes(refs, divide(x, scale, interpret=self.interpret))
            for x, scale in zip(halves, scales)
        )
        codes = out[f"{self.name}_codes"]
        if self.spec.bits == 8:
            tile.store(codes, (low, high))
            return
        if tile.lane_masks[1] is not None:
            high = jnp.where(tile.lane_masks[1], high, 0)
        tiles.store(codes, tile.bytes, low | high << 4, tile.element_masks[0])

    def _load_codes(self, ref: Any, tile: Tile) -> Pair:
        if self.spec.bits == 8:
            low, high = tile.load(ref)
            return low.astype(jnp.int32), high.astype(jnp.int32)
        packed = tiles.load(ref, tile.bytes, tile.element_masks[0]).astype(jnp.int32)
        return packed & 15, packed >> 4

    def _nearest_codes(self, refs: Refs, x: jax.Array) -> jax.Array:
        if len(self.spec.values) > MOST_SELECTS:
            return rank_by_lookups(x, refs[f"{self.name}_table"])
        return rank_by_selects(x, codebooks.decision_table(self.spec.values).boundaries)


@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """A moment with a scale for each group."""

    codec: Codec

    def operands(self, q: QuantizedArray) -> dict[str, Any]:
        """What the kernel reads, by name."""
        return {**self.codec.operands(q), f"{self.codec.name}_scales": q.scales}

    def load(self, refs: Refs, tile: Tile) -> Pair:
        """The moment in the tile, float32."""
        scale = tiles.load(refs[f"{self.codec.name}_scales"], tile.groups, tile.row_mask)
        low, high = self.codec.load(refs, tile)
        return low * scale, high * scale

    def store(self, refs: Refs, out: Refs, tile: Tile, halves: Pair) -> None:
        """Writes scales and codes of float32 ``halves``."""
        # Whatever thread has used an old scale has contributed to this maximum, so a new scale is
        # never written over one that is still to be read.
        low, high = (
            jnp.max(magnitude_bits(half, mask), axis=1, keepdims=True)
            for half, mask in zip(halves, tile.lane_masks)
        )
        scale = from_bits(jnp.maximum(low, high))
        tiles.store(out[f"{self.codec.name}_scales"], tile.groups, scale, tile.row_mask)
        self.codec.store(refs, out, tile, halves, (scale, scale))


@dataclasses.dataclass(frozen=True)
class Rank1Scaled:
    """A moment whose scales are the lesser of a row's and a column's; the new ones are given."""

    codec: Codec

    def operands(self, q: QuantizedArray, new_scales: Any = None) -> dict[str, jax.Array]:
        """What the kernel reads, by name; to store it needs the new scales."""
        name = self.codec.name
        rows, columns = q.scales
        operands = {f"{name}_rows": rows, f"{name}_columns": columns}
        if new_scales is not None:
            new_rows, new_columns = new_scales
            operands |= {f"{name}_new_rows": new_rows, f"{name}_new_columns": new_columns}
        return {**self.codec.operands(q), **operands}

    def load(self, refs: Refs, tile: Tile) -> Pair:
        """The moment in the tile, float32."""
        name = self.codec.name
        row, columns = load_factors(refs[f"{name}_rows"], refs[f"{name}_columns"], tile)
        low, high = self.codec.load(refs, tile)
        return low * lesser(row, columns[0]), high * lesser(row, columns[1])

    def store(self, refs: Refs, out: Refs, tile: Tile, halves: Pair) -> None:
        """Writes the codes of float32 ``halves`` under the new scales."""
        name = self.codec.name
        row, columns = load_factors(refs[f"{name}_new_rows"], refs[f"{name}_new_columns"], tile)
        scales = lesser(row, columns[0]), lesser(row, columns[1])
        self.codec.store(refs, out, tile, halves, scales)


def load_factors(rows: Any, columns: Any, tile: Tile) -> tuple[jax.Array, Pair]:
    """A number for each row ``(rows, 1)`` and, of both halves, for each column ``(1, lanes)``."""
    row = tiles.load(rows, tile.rows, tile.row_mask)
    low, high = (
        tiles.load(columns, index, mask) for index, mask in zip(tile.columns, tile.lane_masks)
    )
    return row, (low, high)


def magnitude_bits(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """int32 in the order of ``|x|``, NaN above all, and 0 where the mask is false.

    The float maxima of Triton and of XLA on a CPU lose NaN, which has to reach the scales to stay
    visible.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    return bits if mask is None else jnp.where(mask, bits, 0)


def from_bits(bits: jax.Array) -> jax.Array:
    """The float32 of :func:`magnitude_bits`."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def lesser(a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.minimum`, which Triton's float minimum is not where there is NaN."""
    return jnp.where((b < a) | (b != b), b, a)


def divide(x: jax.Array, scale: jax.Array, *, interpret: bool) -> jax.Array:
    """As :func:`optax_lowbit.quant.scaling.divide`, given that ``x`` is 0 where the scale is."""
    divisor = jnp.broadcast_to(jnp.where(scale == 0, 1.0, scale), x.shape)
    if interpret:
        return x / divisor
    # Triton's own division is off by up to two units in the last place.
    (quotient,) = triton.elementwise_inline_asm(
        "div.rn.f32 $0, $1, $2;",
        args=[x, divisor],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return quotient


def rank_by_selects(x: jax.Array, boundaries: np.ndarray) -> jax.Array:
    """int32 number of the ascending ``boundaries`` strictly below ``x``; NaN has none below.

    A binary search whose next boundary is chosen by a tree of selects on the outcomes so far:
    half the instructions of one comparison for each boundary.
    """
    steps = int(boundaries.size).bit_length()
    padded = np.full(2**steps - 1, np.inf, np.float32)
    padded[: boundaries.size] = boundaries
    outcomes: list[jax.Array] = []
    for step in reversed(range(steps)):
        candidates = list(padded[2**step - 1 :: 2 ** (step + 1)])
        for outcome in reversed(outcomes):
            pairs = zip(candidates[::2], candidates[1::2])
            candidates = [jnp.where(outcome, above, below) for below, above in pairs]
        outcomes.append(x > candidates[0])
    rank = jnp.zeros(x.shape, jnp.int32)
    for step, outcome in zip(reversed(range(steps)), outcomes):
        rank = rank | jnp.where(outcome, 1 << step, 0)
    return rank


def rank_by_lookups(x: jax.Array, table: Any) -> jax.Array:
    """:func:`rank_by_selects` for the boundaries of a :func:`lookup_table` in memory."""
    rank = jnp.zeros(x.shape, jnp.int32)
    step = TABLE_LENGTH // 2
    while step:
        boundary = tiles.load(table, rank + (TABLE_LENGTH + step - 1), None)
        rank = rank + jnp.where(x > boundary, step, 0)
        step //= 2
    return rank


def lookup_table(values: tuple[float, ...]) -> np.ndarray:
    """Float32 values and boundaries of a sorted code table, each filled up with infinity."""
    table = np.full(2 * TABLE_LENGTH, np.inf, np.float32)
    decisions = codebooks.decision_table(values)
    table[: len(values)] = decisions.sorted_values
    table[TABLE_LENGTH : TABLE_LENGTH + decisions.boundaries.size] = decisions.boundaries
    return table
