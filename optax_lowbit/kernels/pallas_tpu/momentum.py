"""Momentum in one kernel, its trace and the gradient written in place."""

from typing import Any

import jax

from optax_lowbit.kernels.pallas_tpu import chunks, geometry, leaves, operands
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
    """``t' = g + decay t`` on one leaf that :func:`why_not` has nothing against.

    Args:
      grad: float32 or bfloat16 ``(..., n)``; written over by the update unless there is a descent.
      trace: Block-scaled; written in place.
      decay: A float32 scalar.
      nesterov: Whether the update is ``g + decay t'`` instead of ``t'``.
      descent: None, or something with ``params``, ``learning_rate`` and ``weight_decay``.
      interpret: Run it on any platform, slowly.

    Returns:
      The update, in the gradient's dtype, or under a descent the new parameters in theirs; and the
      new trace.
    """

    def on_matrix(grad, trace, decay, descent):
        grid = geometry.plan(grad.shape, (trace.spec.block_size,), batched=False)
        result, codes, scales = chunks.over_chunks(
            "momentum",
            grid,
            [
                operands.scalars([decay]),
                leaves.gradient(grid, grad, descent),
                leaves.block_scaled(grid, trace),
            ],
            _nesterov_body if nesterov else _body,
            interpret=interpret,
        )
        return result.reshape(grad.shape), leaves.restored(trace, codes, scales)

    args = grad, trace, leaves.scalar(decay), leaves.descent_arrays(descent)
    return leaves.on_matrices(on_matrix, trace.spec.block_size, *args)


def _body(chunk, scalars, grad, trace):
    (decay,) = scalars.read()
    new_trace = grad.read(chunk) + decay * trace.read(chunk)
    grad.write(chunk, new_trace)
    trace.write(chunk, new_trace)


def _nesterov_body(chunk, scalars, grad, trace):
    (decay,) = scalars.read()
    g = grad.read(chunk)
    new_trace = g + decay * trace.read(chunk)
    grad.write(chunk, g + decay * new_trace)
    trace.write(chunk, new_trace)
