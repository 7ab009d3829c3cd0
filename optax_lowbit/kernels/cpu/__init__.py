"""Native kernels for CPUs, and a product by tiles: the interface of every backend of `kernels`."""

from optax_lowbit.kernels.cpu.ops import (
    adam,
    adam_rank1_maxima,
    dequantize,
    momentum,
    quantize,
    why_not,
)
from optax_lowbit.kernels.cpu.quantized_dot import quantized_dot

__all__ = [
    "adam",
    "adam_rank1_maxima",
    "dequantize",
    "momentum",
    "quantize",
    "quantized_dot",
    "why_not",
]
