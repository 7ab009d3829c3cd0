"""Which leaves the kernels take."""

import math
from typing import Any, Literal

from optax_lowbit.kernels.codable import why_not_codes, why_not_dtype
from optax_lowbit.kernels.pallas_tpu.geometry import BLOCK_SIZES
from optax_lowbit.kernels.pallas_tpu.quantized_dot import why_not_matrix
from optax_lowbit.quant import QuantSpec
from optax_lowbit.quant.scaling import effective_scaling, rank1_axes

Op = Literal["adam", "momentum", "quantize", "dequantize", "quantized_dot"]

# The maxima of all columns lie in VMEM at once: 4 MiB, and as much again to overlap copies.
MOST_RANK1_COLUMNS = 2**20


def why_not(op: Op, shape: tuple[int, ...], dtype: Any, *specs: QuantSpec | None) -> str | None:
    """Why the kernels do not take a leaf; None if they do.

    Args:
      op: ``"adam"``, ``"momentum"``, ``"quantize"``, ``"dequantize"`` or ``"quantized_dot"``.
      shape: The leaf's, as a whole; that of a product's matrix, transposed.
      dtype: The gradient's, or that of the array; of a product, that of ``x``.
      *specs: Of the moments: for ``"adam"`` of the first and the second (None: factored).

    Raises:
      ValueError: If there is no such op, or it has another number of moments.

    Examples:
      >>> from optax_lowbit import QuantSpec
      >>> from optax_lowbit.kernels.pallas_tpu import why_not
      >>> spec = QuantSpec(codebook="dynamic_exponent", bits=4, signed=True, scaling="block")
      >>> why_not("momentum", (4096, 1000), "bfloat16", spec)
      >>> why_not("momentum", (4096, 1000), "float16", spec)
      'dtype float16, neither float32 nor bfloat16'
    """
    moments = {"adam": 2, "momentum": 1, "quantize": 1, "dequantize": 1, "quantized_dot": 1}
    if op not in moments or len(specs) != moments[op]:
        raise ValueError(f"op must be one of {moments} (with that many specs), got {op!r}, {specs}")
    if reason := why_not_dtype(dtype):
        return reason
    if op == "quantized_dot" and specs[0] is not None:
        return why_not_matrix(shape, specs[0])
    if not math.prod(shape):
        return "no elements"
    if not shape:
        return "no axes"
    factored = op == "adam" and specs[1] is None
    if factored and len(shape) < 2:
        return "a factored second moment of a vector"
    for number, spec in enumerate(specs):
        if spec is None:
            if not (factored and number == 1):
                return "a moment that is not quantized"
            continue
        is_second = op == "adam" and number == 1
        reason = _spec_refused(spec) or _scaling_refused(shape, spec, is_second)
        if reason:
            return reason
    return None


def _spec_refused(spec: QuantSpec) -> str | None:
    if reason := why_not_codes(spec):
        return reason
    if spec.block_size not in BLOCK_SIZES:
        return f"blocks of {spec.block_size}, not of {' or '.join(map(str, BLOCK_SIZES))}"
    return None


def _scaling_refused(shape: tuple[int, ...], spec: QuantSpec, is_second: bool) -> str | None:
    scaling = effective_scaling(spec.scaling, len(shape))
    if scaling == "block":
        return None
    if scaling != "rank1" or not is_second:
        return f"{scaling} scales"
    axes = rank1_axes(shape, spec.block_size)
    if axes != 2:
        return f"rank-1 scales over {axes} axes"
    if shape[-1] > MOST_RANK1_COLUMNS:
        return f"rank-1 scales of more than {MOST_RANK1_COLUMNS} columns"
    return None
