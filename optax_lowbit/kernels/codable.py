"""What all kernels need of arrays, and of how they are stored."""

from typing import Any

import jax.numpy as jnp

from optax_lowbit.quant import QuantSpec, codebooks


def why_not_dtype(dtype: Any) -> str | None:
    """Why no kernel reads and writes floats of a dtype; None if all do."""
    if jnp.dtype(dtype) in (jnp.float32, jnp.bfloat16):
        return None
    return f"dtype {jnp.dtype(dtype)}, neither float32 nor bfloat16"


def why_not_codes(spec: QuantSpec) -> str | None:
    """Why no kernel reads and writes the codes of a spec; None if one may."""
    if reason := why_not_read(spec):
        return reason
    if codebooks.decision_table(spec.values).codes is not None:
        return "table that is not sorted"
    return None


def why_not_read(spec: QuantSpec) -> str | None:
    """Why no kernel reads the codes of a spec; None if one may."""
    if spec.bits not in (4, 8):
        return f"{spec.bits} bits"
    if spec.rounding != "nearest":
        return f"{spec.rounding} rounding"
    if spec.signed_scale:
        return "signed scales"
    return None
