"""A metric over seeds: what is kept of it, and how it is shown."""

import math
import statistics
from collections.abc import Sequence
from typing import Any


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Values with their mean and sample standard deviation; None for what is not finite."""
    finite = all(math.isfinite(value) for value in values)
    return {
        "values": [value if math.isfinite(value) else None for value in values],
        "mean": statistics.fmean(values) if finite else None,
        "std": statistics.stdev(values) if finite and len(values) > 1 else None,
    }


def shown(values: dict[str, Any], sign: str = "") -> str:
    """``mean ± std``; a value that is huge or not finite in words."""
    if values["mean"] is None:
        return "not finite"
    digits = 4 if abs(values["mean"]) < 10 else 2
    if abs(values["mean"]) >= 1e4:
        return f"{values['mean']:.1e}"
    std = "" if values["std"] is None else f" ± {values['std']:.{digits}f}"
    return f"{values['mean']:{sign}.{digits}f}{std}"
