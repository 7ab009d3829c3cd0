from optax_lowbit.quant.array import (
    QuantizedArray,
    dequantize,
    is_quantized,
    quantize,
)
from optax_lowbit.quant.codebooks import codebook
from optax_lowbit.quant.spec import QuantSpec

__all__ = (
    "QuantSpec",
    "QuantizedArray",
    "codebook",
    "dequantize",
    "is_quantized",
    "quantize",
)
