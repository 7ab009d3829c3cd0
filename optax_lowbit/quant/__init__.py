from optax_lowbit.quant.array import (
    QuantizedArray,
    QuantSpec,
    dequantize,
    is_quantized,
    quantize,
)
from optax_lowbit.quant.codebooks import codebook

__all__ = (
    "QuantSpec",
    "QuantizedArray",
    "codebook",
    "dequantize",
    "is_quantized",
    "quantize",
)
