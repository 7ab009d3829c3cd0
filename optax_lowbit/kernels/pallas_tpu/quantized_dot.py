"""Products with a matrix in four bits that is decoded in VMEM, a tile at a time.

The matrix is never in memory but in four bits, and is read as it is stored. In a register of 128
bytes the low and high nibbles of blocks take turns; one gather along lanes puts the byte of each
value in its lane, another looks values up: fewer instructions than rotations and a tree of selects.
Compiled for a v5e, the whole kernel of a step of 1024 by 512 by 512, which keeps each of its matrix
units busy for 4096 cycles, is 6119 instruction bundles long, transposed 5336.

References:
  Dettmers et al, `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, Section 3.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from optax_lowbit.kernels.pallas_tpu.geometry import LANES
from optax_lowbit.quant import QuantizedArray, QuantSpec, rounding

# A matrix is cut into tiles of the first of these that divide its rows and columns: the more of
# them, the less often x is read. 128 bytes are a register's lanes, and 256 columns.
_TILE_ROWS = (512, 256, 128)
_TILE_COLUMNS = (512, 256)
# Of a column of x, in a tile: with two buffers for each array, the sums, and what is decoded, 8 MiB
# of VMEM, where 16 are the least default. A tile is decoded once for so many rows of x.
_BATCH_BYTES = 2048
# Rows in a register of bfloat16.
_SUBLANES = 16
# Whose values lie within 256 columns.
BLOCK_SIZES = (32, 64, 128, 256)


class _Tiles(NamedTuple):
    batch: int
    rows: int
    columns: int


def why_not_matrix(shape: tuple[int, ...], spec: QuantSpec) -> str | None:
    """Why :func:`quantized_dot` does not take a matrix ``(m, n)``, stored so; None if it does."""
    if len(shape) != 2:
        return "a matrix whose rows are not stored apart"
    if not all(shape) or shape[0] % _TILE_ROWS[-1] or shape[1] % _TILE_COLUMNS[-1]:
        return f"no whole tiles of {_TILE_ROWS[-1]} rows and {_TILE_COLUMNS[-1]} columns"
    if spec.bits != 4:
        return f"{spec.bits} bits"
    if spec.scaling != "block":
        return f"{spec.scaling} scales"
    return None if spec.block_size in BLOCK_SIZES else f"blocks of {spec.block_size}"


def quantized_dot(
    x: jax.Array, rows: QuantizedArray, *, is_transposed: bool, interpret: bool = False
) -> jax.Array:
    """``x @ rows.T`` for ``x`` ``(batch, n)`` or, transposed, ``x @ rows`` for ``(batch, m)``.

    Args:
      x: float32 or bfloat16.
      rows: ``(m, n)``, which :func:`why_not_matrix` has nothing against, with float32 scales. Its
        values are rounded to its dtype, then to that of ``x``.
      is_transposed: Which product.
      interpret: Run it on any platform, slowly.

    Returns:
      ``(batch, m)``, or ``(batch, n)``, in the dtype of ``x``; summed up in float32.
    """
    (m, n), batch = rows.shape, x.shape[0]
    tile = _tiles(batch, m, n, x.dtype.itemsize)
    summed, kept = tile.columns, tile.rows
    if is_transposed:
        summed, kept = kept, summed
    (_, size), width = x.shape, n if is_transposed else m

    def of_matrix(shape: tuple[int | None, ...], index: Any) -> pl.BlockSpec:
        # A step's tile of rows and tile of columns.
        return pl.BlockSpec(shape, lambda i, j, k: index(*((k, j) if is_transposed else (j, k))))

    # By tiles of columns, as a tile must span the whole of an axis that is shorter than a register;
    # and transposed, as XLA lays out an array with a short last axis.
    scales = rows.scales.reshape(m, n // tile.columns, -1).transpose(1, 2, 0)
    return pl.pallas_call(
        functools.partial(_kernel, spec=rows.spec, dtype=rows.dtype, is_transposed=is_transposed),
        grid=(pl.cdiv(batch, tile.batch), width // kept, size // summed),
        in_specs=[
            pl.BlockSpec((tile.batch, summed), lambda i, j, k: (i, k)),
            of_matrix((tile.rows, tile.columns // 2), lambda r, c: (r, c)),
            of_matrix((None, scales.shape[1], tile.rows), lambda r, c: (c, 0, r)),
        ],
        out_specs=pl.BlockSpec((tile.batch, kept), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct(
            (batch, width), x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type
        ),
        scratch_shapes=[pltpu.VMEM((tile.batch, kept), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(pltpu.PARALLEL, pltpu.PARALLEL, pltpu.ARBITRARY)
        ),
        interpret=interpret,
        name="quantized_dot_transposed" if is_transposed else "quantized_dot",
    )(x, rows.codes, scales)


def _tiles(batch: int, m: int, n: int, itemsize: int) -> _Tiles:
    return _Tiles(
        min(_BATCH_BYTES // itemsize, -(-batch // _SUBLANES) * _SUBLANES),
        next(size for size in _TILE_ROWS if m % size == 0),
        next(size for size in _TILE_COLUMNS if n % size == 0),
    )


def _kernel(x_ref, codes_ref, scales_ref, y_ref, sums_ref, *, spec, dtype, is_transposed):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    decoded = _decoded(codes_ref, scales_ref[...].T, spec)
    # Through float32: there is no cast from one short type to another.
    decoded = decoded.astype(dtype).astype(jnp.float32).astype(x_ref.dtype)
    sums_ref[...] += jax.lax.dot_general(
        x_ref[...],
        decoded,
        (((1,), (0 if is_transposed else 1,)), ((), ())),
        precision=_precision(x_ref.dtype),
        preferred_element_type=jnp.float32,
    )

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        y_ref[...] = sums_ref[...].astype(y_ref.dtype)


def _precision(dtype: Any) -> jax.lax.Precision:
    """What the user has asked for, as far as there is a choice: for float32, and of two."""
    config: Any = jax.config
    asked = config.jax_default_matmul_precision
    if dtype != jnp.float32 or asked in (None, "default", "fastest", "bfloat16"):
        return jax.lax.Precision.DEFAULT
    return jax.lax.Precision.HIGHEST


def _decoded(codes_ref, scales: jax.Array, spec: QuantSpec) -> jax.Array:
    """A tile in float32; its scales are ``(rows, blocks)``."""
    rows, width = codes_ref.shape
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    # The table over and over: of a lane's number only the four lowest bits are looked at.
    table = rounding.code_values(lane[:1], spec.values)
    table = jnp.broadcast_to(table, (rows, LANES))
    pieces = []
    for first in range(0, 2 * width, LANES):
        start = first // (2 * LANES) * LANES
        packed = codes_ref[:, start : start + LANES].astype(jnp.int32)
        codes = _unpacked(packed, first - 2 * start + lane, spec.block_size)
        pieces.append(_take(table, codes) * _beside(scales, first, lane, spec.block_size))
    return jnp.concatenate(pieces, axis=1)


def _unpacked(packed: jax.Array, column: jax.Array, block_size: int) -> jax.Array:
    """The codes of columns, of the 256 in 128 bytes of whole blocks, or of a half of a block."""
    half = block_size // 2
    within = column & (block_size - 1)
    byte = _take(packed, (column - within >> 1) + (within & (half - 1)))
    return byte >> jnp.where(within < half, 0, 4) & 15


def _beside(scales: jax.Array, first: int, lane: jax.Array, block_size: int) -> jax.Array:
    """The scales of 128 columns from ``first`` on, each in the lanes of its block."""
    block = first // block_size
    columns = [scales[:, i : i + 1] for i in range(block, block + max(1, LANES // block_size))]
    wide, *others = (jnp.broadcast_to(column, lane.shape) for column in columns)
    for number, other in enumerate(others, 1):
        wide = jnp.where(lane < number * block_size, wide, other)
    return wide


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")
