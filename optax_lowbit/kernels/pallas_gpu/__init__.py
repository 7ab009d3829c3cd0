"""Pallas kernels for GPUs, through Triton: the interface of every backend of `kernels`."""

from optax_lowbit.kernels.pallas_gpu.adam import adam, adam_rank1_maxima
from optax_lowbit.kernels.pallas_gpu.eligibility import why_not
from optax_lowbit.kernels.pallas_gpu.momentum import momentum
from optax_lowbit.kernels.pallas_gpu.quantization import dequantize, quantize
from optax_lowbit.kernels.pallas_gpu.quantized_dot import quantized_dot

__all__ = [
    "adam",
    "adam_rank1_maxima",
    "dequantize",
    "momentum",
    "quantize",
    "quantized_dot",
    "why_not",
]
