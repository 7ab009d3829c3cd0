"""Products with large frozen matrices in few bits, a tile of rows dequantized at a time.

A tile stays in the processor's cache between the two. A whole matrix of 32 MiB or more goes through
memory twice, and the system has to map that memory anew for every product.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.kernels import quantization
from optax_lowbit.kernels.meshes import as_varying, varying_axes
from optax_lowbit.kernels.reference import float_dtype
from optax_lowbit.quant import QuantizedArray

# Below either bound XLA's product with the whole matrix is as fast, or faster.
LEAST_BYTES = 2**25
MOST_ROWS = 512  # of x
_LEAST_TILE, _TILE = 128, 256


def why_not_matrix(shape: tuple[int, ...], itemsize: int, group_size: int) -> str | None:
    """Why :func:`quantized_dot` does not take a matrix ``(m, n)``, stored so; None if it does."""
    if len(shape) != 2 or shape[1] % group_size:
        return "a matrix whose rows are not whole blocks"
    if shape[0] * shape[1] * itemsize < LEAST_BYTES:
        return f"a matrix of less than {LEAST_BYTES >> 20} MiB, which is dequantized whole"
    if _tile_rows(shape[0]) is None:
        return f"no whole tiles of {_LEAST_TILE} to {_TILE} rows"
    return None


def quantized_dot(x: jax.Array, rows: QuantizedArray, *, is_transposed: bool) -> jax.Array:
    """``x @ rows.T`` for ``x`` ``(batch, n)`` or, transposed, ``x @ rows`` for ``(batch, m)``.

    Args:
      x: Floats.
      rows: ``(m, n)`` of whole tiles and blocks, with float32 scales. Its values are rounded to its
        dtype, then to that of ``x``.
      is_transposed: Which product.

    Returns:
      ``(batch, m)``, or ``(batch, n)``, in the dtype of ``x``, summed up in float32.
    """
    m, n = rows.shape
    length = _tile_rows(m)
    assert length is not None
    tiles = jax.tree.map(lambda leaf: leaf.reshape(m // length, length, *leaf.shape[1:]), rows)
    if not is_transposed:

        def columns(_, tile):
            return None, _dot(_floats(tile, x), x, (1, 1)).astype(x.dtype)

        _, y = jax.lax.scan(columns, None, tiles)
        return y.reshape(m, -1).T

    def add(y, both):
        tile, part = both
        return y + _dot(part, _floats(tile, x), (1, 0)), None

    parts = jnp.moveaxis(x.reshape(-1, m // length, length), 1, 0)
    zeros = as_varying(jnp.zeros((x.shape[0], n), float_dtype(x.dtype)), varying_axes(x))
    y, _ = jax.lax.scan(add, zeros, (tiles, parts))
    return y.astype(x.dtype)


def _floats(tile: QuantizedArray, x: jax.Array) -> jax.Array:
    return quantization.dequantize(tile, "cpu").astype(x.dtype)


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    contracted: Any = ((axes[:1], axes[1:]), ((), ()))
    return jax.lax.dot_general(a, b, contracted, preferred_element_type=float_dtype(a.dtype))


def _tile_rows(m: int) -> int | None:
    """The largest part of ``m`` that is a tile; None if there is none."""
    lengths = range(_TILE, _LEAST_TILE - 1, -1)
    return next((length for length in lengths if m % length == 0), None)
