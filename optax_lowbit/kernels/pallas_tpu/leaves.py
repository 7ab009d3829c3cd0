"""A leaf's arrays as kernels take them, and back; vectors as matrices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.pallas_tpu import operands
from optax_lowbit.kernels.pallas_tpu.chunks import Operand
from optax_lowbit.kernels.pallas_tpu.geometry import TILE_BLOCKS, Grid
from optax_lowbit.kernels.pallas_tpu.operands import Factors, Stored
from optax_lowbit.quant import QuantizedArray, is_quantized
from optax_lowbit.quant.array import code_padding
from optax_lowbit.quant.scaling import Scales


def stored(q: QuantizedArray, grid: Grid) -> Stored:
    """The arrays of a block-scaled moment."""
    return Stored(_rows(q.codes, grid), _rows(_block_scales(q), grid).mT)


def _rows(x: jax.Array, grid: Grid) -> jax.Array:
    return x.reshape(grid.batch, grid.rows, x.shape[-1])


def _block_scales(q: QuantizedArray) -> jax.Array:
    assert not isinstance(q.scales, tuple)
    return q.scales


def abstract(q: QuantizedArray, grid: Grid) -> Stored:
    """What a kernel writes for a block-scaled moment like ``q``."""
    codes = (grid.batch, grid.rows, q.codes.shape[-1])
    scales = (grid.batch, _block_scales(q).shape[-1], grid.rows)
    return Stored(jax.ShapeDtypeStruct(codes, jnp.uint8), jax.ShapeDtypeStruct(scales, jnp.float32))


def block_scaled(grid: Grid, q: QuantizedArray) -> Operand:
    """A block-scaled moment, written in place."""
    return operands.block_scaled(grid, q.spec, stored(q, grid), abstract(q, grid))


def gradient(grid: Grid, grad: jax.Array, descent: Any) -> Operand:
    """The gradient, see :func:`operands.gradient`; ``descent`` is from :func:`descent_arrays`."""
    if descent is not None:
        params, *rates = descent
        descent = params.reshape(grid.shape), *rates
    return operands.gradient(grid, grad.reshape(grid.shape), descent)


def descent_arrays(descent: Any) -> tuple[jax.Array, jax.Array, jax.Array] | None:
    """Parameters, learning rate and weight decay."""
    if descent is None:
        return None
    return descent.params, scalar(descent.learning_rate), scalar(descent.weight_decay)


def scalar(x: jax.typing.ArrayLike) -> jax.Array:
    """A float32 scalar."""
    return jnp.asarray(x, jnp.float32)


def restored(q: QuantizedArray, codes: jax.Array, scales: jax.Array | Scales) -> QuantizedArray:
    """``q`` with new codes and block scales from a kernel, or with rank-1 scales."""
    if not isinstance(scales, tuple):
        scales = scales.mT.reshape(_block_scales(q).shape)
    return dataclasses.replace(q, codes=codes.reshape(q.codes.shape), scales=scales)


def rank1_scaled(grid: Grid, q: QuantizedArray, new_scales: Any = None) -> Operand:
    """A moment with two rank-1 scales; written in place, under new scales, if there are any."""
    new = None if new_scales is None else factors(grid, new_scales)
    return operands.rank1_scaled(grid, q.spec, _rows(q.codes, grid), factors(grid, q.scales), new)


def factors(grid: Grid, pair: Any) -> Factors:
    """Arrays of shapes ``(..., rows, 1)`` and ``(..., 1, columns)``."""
    rows, columns = pair
    return Factors(
        rows.reshape(grid.batch, 1, grid.rows), columns.reshape(grid.batch, 1, grid.columns)
    )


def on_matrices(f: Callable[..., Any], block_size: int, *args: Any) -> Any:
    """``f(*args)`` for leaves of any number of axes, by an ``f`` that takes at least two.

    A vector is handed over as a matrix whose rows are as wide as a tile, and what is left of it as
    one more row. XLA lays out vectors and matrices differently, so both are copies.

    Args:
      f: Takes and returns pytrees of arrays and block-scaled :class:`QuantizedArray`.
      block_size: The largest of the moments'.
      *args: Arrays of the leaf's shape, scalars, and :class:`QuantizedArray`.
    """
    leaves = [x for x in jax.tree.leaves(args, is_leaf=is_quantized) if x.ndim]
    if leaves[0].ndim > 1:
        return f(*args)
    size, width = leaves[0].shape[0], TILE_BLOCKS * block_size
    rows = size // width
    parts = []
    for first, last, matrix in ((0, rows * width, (rows, width)), (rows * width, size, (1, -1))):
        if first < last:
            taken = _map(lambda x, a=first, b=last, m=matrix: _taken(x, a, b, m), args)
            parts.append(_map(_as_vector, f(*taken)))
    return parts[0] if len(parts) == 1 else _map(_joined, *parts)


def _map(f: Callable[..., Any], *trees: Any) -> Any:
    return jax.tree.map(f, *trees, is_leaf=is_quantized)


def _taken(x: Any, first: int, last: int, matrix: tuple[int, int]) -> Any:
    """Elements of a vector as a matrix; scalars as they are."""
    if x.ndim == 0:
        return x
    if not is_quantized(x):
        return x[first:last].reshape(matrix)
    block, bits = x.spec.block_size, x.spec.bits
    return dataclasses.replace(
        x,
        codes=x.codes[first * bits // 8 : -(-last * bits // 8)].reshape(matrix[0], -1),
        scales=x.scales[first // block : -(-last // block)].reshape(matrix[0], -1),
        padding=code_padding(last - first, bits),
    )


def _as_vector(x: Any) -> Any:
    if not is_quantized(x):
        return x.reshape(-1)
    return dataclasses.replace(x, codes=x.codes.reshape(-1), scales=x.scales.reshape(-1))


def _joined(x: Any, *rest: Any) -> Any:
    if not is_quantized(x):
        return jnp.concatenate([x, *rest])
    return dataclasses.replace(
        rest[-1],
        codes=jnp.concatenate([x.codes, *(r.codes for r in rest)]),
        scales=jnp.concatenate([x.scales, *(r.scales for r in rest)]),
    )
