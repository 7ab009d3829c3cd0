"""Momentum kept in few bits, as a Triton kernel: one read and one write of everything."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.pallas_gpu.launch import Refs, launch_step, store_result
from optax_lowbit.kernels.pallas_gpu.moments import BlockScaled, Codec
from optax_lowbit.kernels.pallas_gpu.slices import step_in_slices
from optax_lowbit.kernels.pallas_gpu.tiles import Tiling, flat_tiling
from optax_lowbit.quant import QuantizedArray


def momentum(
    grad: jax.Array,
    trace: QuantizedArray,
    decay: jax.Array,
    *,
    nesterov: bool,
    descent: Any = None,
    interpret: bool = False,
) -> tuple[jax.Array, QuantizedArray]:
    """A step of momentum on one leaf, in place: ``t' = g + decay t``.

    Args:
      grad: float32 or bfloat16, ``(..., n)``.
      trace: ``t``, block-scaled.
      decay: float32 scalar.
      nesterov: Whether the update is ``g + decay t'`` instead of ``t'``.
      descent: None, or parameters, learning rate and weight decay in attributes of these names.
      interpret: Whether to interpret the kernel, on any platform.

    Returns:
      ``(result, trace)``. The result is the update, in the gradient's dtype and written over the
      gradient; or, with ``descent``, the new parameters, written over the old ones. Codes and
      scales are written over the old ones.
    """

    def step(grad, trace, others, descent):
        del others
        return _momentum_at_once(grad, trace, decay, nesterov, descent, interpret)

    return step_in_slices(step, grad, trace, None, descent)


def _momentum_at_once(grad, trace, decay, nesterov, descent, interpret):
    moment = BlockScaled(Codec("trace", trace.spec, interpret))
    tiling = flat_tiling(grad.shape, trace.spec.block_size)
    inputs = {"grad": grad, **moment.operands(trace)}
    moments = {"trace_codes": trace.codes, "trace_scales": trace.scales}
    kernel = functools.partial(_momentum_kernel, tiling=tiling, moment=moment, nesterov=nesterov)
    new = launch_step(kernel, tiling, [decay], inputs, moments, descent, interpret=interpret)
    codes, scales = new["trace_codes"], new["trace_scales"]
    return new["result"], dataclasses.replace(trace, codes=codes, scales=scales)


def _momentum_kernel(refs: Refs, out: Refs, *, tiling: Tiling, moment: BlockScaled, nesterov: bool):
    tile = tiling.tile(tiling.program())
    decay = refs["scalars"][0]
    grads = [half.astype(jnp.float32) for half in tile.load(refs["grad"])]
    low, high = (g + decay * t for g, t in zip(grads, moment.load(refs, tile)))
    updates = low, high
    if nesterov:
        updates = grads[0] + decay * low, grads[1] + decay * high
    store_result(refs, out, tile, updates)
    moment.store(refs, out, tile, (low, high))
