"""Which leaves the kernels take."""

import math
from typing import Any

from optax_lowbit.kernels.codable import why_not_codes, why_not_dtype
from optax_lowbit.kernels.pallas_gpu.quantized_dot import why_not_matrix
from optax_lowbit.kernels.pallas_gpu.slices import why_not_slices
from optax_lowbit.quant import QuantSpec, scaling

# Half of it are the lanes of a tile, two values of each moment to a lane.
_LARGEST_BLOCK = 4096
_OPERANDS = {"adam": 2, "momentum": 1, "quantize": 1, "dequantize": 1, "quantized_dot": 1}


def why_not(op: str, shape: tuple[int, ...], dtype: Any, *specs: QuantSpec | None) -> str | None:
    """Why a kernel does not take a leaf, in a few words; None if it does.

    Args:
      op: ``"adam"``, ``"momentum"``, ``"quantize"``, ``"dequantize"`` or ``"quantized_dot"``.
      shape: Of the leaf, as it lies on one device; of a product's matrix, transposed.
      dtype: Of the gradient and parameters, or of the array that is quantized, or multiplied by the
        matrix.
      specs: How it is stored: for Adam the first and the second moment (None for a factored second
        moment), otherwise the one array.

    Raises:
      ValueError: If there is no such operation, or another number of specs.
    """
    if op not in _OPERANDS or len(specs) != _OPERANDS[op]:
        raise ValueError(
            f"op must be one of {tuple(_OPERANDS)} with as many specs, got {op!r} and {len(specs)}"
        )
    first, *others = specs
    if first is None:
        return "moment that is not quantized"
    if op == "quantized_dot":
        return _why_not_leaf(shape, dtype) or why_not_matrix(shape, first)
    reason = _why_not_leaf(shape, dtype) or _why_not_spec(first)
    if reason is None and scaling.effective_scaling(first.scaling, len(shape)) != "block":
        reason = f"{first.scaling} scales"
    for nu in others if reason is None else ():
        reason = _why_not_second_moment(shape, first, nu)
    return reason


def _why_not_leaf(shape: tuple[int, ...], dtype: Any) -> str | None:
    if reason := why_not_dtype(dtype):
        return reason
    if not shape:
        return "no axes"
    if math.prod(shape) == 0:
        return "no elements"
    return why_not_slices(shape)


def _why_not_spec(spec: QuantSpec) -> str | None:
    if reason := why_not_codes(spec):
        return reason
    if spec.bits == 4 and spec.block_size % 2:
        return "blocks of odd size in 4 bits"
    if spec.block_size > _LARGEST_BLOCK:
        return f"blocks of more than {_LARGEST_BLOCK}"
    return None


def _why_not_second_moment(
    shape: tuple[int, ...], first: QuantSpec, second: QuantSpec | None
) -> str | None:
    if second is None:
        return "factored moment of a vector" if len(shape) < 2 else None
    reason = _why_not_spec(second)
    if reason is not None:
        return reason
    if second.block_size != first.block_size:
        return "moments with blocks of two sizes"
    kind = scaling.effective_scaling(second.scaling, len(shape))
    if kind == "block":
        return None
    if kind != "rank1":
        return f"{kind} scales"
    axes = scaling.rank1_axes(shape, second.block_size)
    return None if axes == 2 else f"rank-1 scales along {axes} axes"
