"""Quantizing and dequantizing in blocks, as Triton kernels."""

import functools

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.pallas_gpu.launch import Refs, launch
from optax_lowbit.kernels.pallas_gpu.moments import BlockScaled, Codec
from optax_lowbit.kernels.pallas_gpu.slices import mapped
from optax_lowbit.kernels.pallas_gpu.tiles import Tiling, flat_tiling
from optax_lowbit.quant import QuantizedArray, QuantSpec
from optax_lowbit.quant.array import abstract_quantized


def quantize(x: jax.Array, spec: QuantSpec, *, interpret: bool = False) -> QuantizedArray:
    """:func:`optax_lowbit.quant.quantize` in blocks, rounding to nearest.

    Args:
      x: float32 or bfloat16, ``(..., n)``.
      spec: How to store it.
      interpret: Whether to interpret the kernel, on any platform.
    """
    whole = functools.partial(_quantize_at_once, spec=spec, interpret=interpret)
    return mapped(whole, x.shape, x)


def _quantize_at_once(x, *, spec, interpret):
    q = abstract_quantized(x.shape, x.dtype, spec)
    array = BlockScaled(Codec("q", spec, interpret))
    tiling = flat_tiling(x.shape, spec.block_size)
    kernel = functools.partial(_quantize_kernel, tiling=tiling, array=array)
    inputs = {"x": x, **array.codec.table()}
    outputs = {"q_codes": q.codes, "q_scales": q.scales}
    new = launch(kernel, tiling, inputs, outputs, {}, interpret=interpret)
    return QuantizedArray(new["q_codes"], new["q_scales"], spec, q.padding, q.dtype)


def dequantize(q: QuantizedArray, *, interpret: bool = False) -> jax.Array:
    """:func:`optax_lowbit.quant.dequantize` of a block-scaled array, to float32 or bfloat16.

    Args:
      q: The array.
      interpret: Whether to interpret the kernel, on any platform.
    """
    return mapped(functools.partial(_dequantize_at_once, interpret=interpret), q.shape, q)


def _dequantize_at_once(q, *, interpret):
    array = BlockScaled(Codec("q", q.spec, interpret))
    tiling = flat_tiling(q.shape, q.spec.block_size)
    kernel = functools.partial(_dequantize_kernel, tiling=tiling, array=array)
    outputs = {"x": jax.ShapeDtypeStruct(q.shape, q.dtype)}
    return launch(kernel, tiling, array.operands(q), outputs, {}, interpret=interpret)["x"]


def _quantize_kernel(refs: Refs, out: Refs, *, tiling: Tiling, array: BlockScaled):
    tile = tiling.tile(tiling.program())
    low, high = (half.astype(jnp.float32) for half in tile.load(refs["x"]))
    array.store(refs, out, tile, (low, high))


def _dequantize_kernel(refs: Refs, out: Refs, *, tiling: Tiling, array: BlockScaled):
    tile = tiling.tile(tiling.program())
    tile.store(out["x"], array.load(refs, tile))
