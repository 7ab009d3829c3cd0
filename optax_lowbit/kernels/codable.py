"""What all kernels need of how an array is stored."""

from optax_lowbit.quant import QuantSpec, codebooks


def why_not_codes(spec: QuantSpec) -> str | None:
    """Why no kernel reads and writes the codes of a spec; None if one may."""
    if spec.bits not in (4, 8):
        return f"{spec.bits} bits"
    if spec.rounding != "nearest":
        return f"{spec.rounding} rounding"
    if spec.signed_scale:
        return "signed scales"
    if codebooks.decision_table(spec.values).codes is not None:
        return "table that is not sorted"
    return None
