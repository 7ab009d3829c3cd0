"""Optax optimizers whose state is kept in few bits."""

from optax_lowbit.quant import QuantizedArray, QuantSpec, dequantize, is_quantized, quantize
