"""Kernels for TPUs, in Pallas (Mosaic): fused, in place, equal to the reference code for code."""

from optax_lowbit.kernels.pallas_tpu.adam import adam, adam_rank1_maxima
from optax_lowbit.kernels.pallas_tpu.momentum import momentum
from optax_lowbit.kernels.pallas_tpu.quantization import dequantize, quantize
from optax_lowbit.kernels.pallas_tpu.quantized_dot import quantized_dot
from optax_lowbit.kernels.pallas_tpu.support import why_not

__all__ = [
    "adam",
    "adam_rank1_maxima",
    "dequantize",
    "momentum",
    "quantize",
    "quantized_dot",
    "why_not",
]
