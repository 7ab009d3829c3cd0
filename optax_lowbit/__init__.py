"""Optax optimizers whose state is kept in few bits."""

import importlib.metadata

from optax_lowbit.optimizers import (
    Description,
    FactoredMoment,
    Policy,
    Trace4bitState,
    adam4bit,
    adam8bit,
    adamw4bit,
    adamw8bit,
    apply_updates_stochastic,
    describe,
    factor4bit,
    fused_apply,
    muon4bit,
    quantize_state,
    scale_by_adam4bit,
    scale_by_adam8bit,
    scale_by_factor4bit,
    sgd4bit,
    sgd8bit,
    trace4bit,
)
from optax_lowbit.quant import (
    QuantizedArray,
    QuantSpec,
    codebook,
    dequantize,
    is_quantized,
    quantize,
)

__version__ = importlib.metadata.version("optax-lowbit")

__all__ = (
    "Description",
    "FactoredMoment",
    "Policy",
    "QuantSpec",
    "QuantizedArray",
    "Trace4bitState",
    "adam4bit",
    "adam8bit",
    "adamw4bit",
    "adamw8bit",
    "apply_updates_stochastic",
    "codebook",
    "dequantize",
    "describe",
    "factor4bit",
    "fused_apply",
    "is_quantized",
    "muon4bit",
    "quantize",
    "quantize_state",
    "scale_by_adam4bit",
    "scale_by_adam8bit",
    "scale_by_factor4bit",
    "sgd4bit",
    "sgd8bit",
    "trace4bit",
)
