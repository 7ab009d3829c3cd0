"""Quantizing and dequantizing block by block."""

import jax

from optax_lowbit.kernels.pallas_tpu import chunks, geometry, leaves, operands
from optax_lowbit.quant import QuantizedArray, QuantSpec
from optax_lowbit.quant.array import abstract_quantized


def quantize(x: jax.Array, spec: QuantSpec, *, interpret: bool = False) -> QuantizedArray:
    """``x``, float32 or bfloat16, in few bits: as :func:`optax_lowbit.quantize`.

    Args:
      x: What :func:`why_not` has nothing against under that spec.
      spec: Block-scaled, nearest rounding.
      interpret: Run it on any platform, slowly.
    """

    def on_matrix(x):
        grid = geometry.plan(x.shape, (spec.block_size,), batched=False)
        made = abstract_quantized(x.shape, x.dtype, spec)
        codes, scales = chunks.over_chunks(
            "quantize",
            grid,
            [
                operands.elements(grid, x.reshape(grid.shape)),
                operands.block_scaled(grid, spec, None, leaves.abstract(made, grid)),
            ],
            lambda chunk, x, q: q.write(chunk, x.read(chunk)),
            interpret=interpret,
        )
        return leaves.restored(made, codes, scales)

    return leaves.on_matrices(on_matrix, spec.block_size, x)


def dequantize(q: QuantizedArray, *, interpret: bool = False) -> jax.Array:
    """The float array of ``q.shape`` and ``q.dtype``: as :func:`optax_lowbit.dequantize`.

    Args:
      q: What :func:`why_not` has nothing against.
      interpret: Run it on any platform, slowly.
    """

    def on_matrix(q):
        grid = geometry.plan(q.shape, (q.spec.block_size,), batched=False)
        (x,) = chunks.over_chunks(
            "dequantize",
            grid,
            [
                operands.block_scaled(grid, q.spec, leaves.stored(q, grid), None),
                operands.elements(grid, None, jax.ShapeDtypeStruct(grid.shape, q.dtype)),
            ],
            lambda chunk, q, x: x.write(chunk, q.read(chunk)),
            interpret=interpret,
        )
        return x.reshape(q.shape)

    return leaves.on_matrices(on_matrix, q.spec.block_size, q)
