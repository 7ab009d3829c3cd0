"""What the fields of adapters may be."""

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from optax_lowbit.moments.policy import compiled_pattern

if TYPE_CHECKING:
    from optax_lowbit.adapters.lora import LoRA

INITIALIZATIONS = ("default", "gaussian", "pissa", "olora", "loftq")
# These start on another base than the given one.
CHANGES_BASE = ("pissa", "olora", "loftq")
BIASES = ("none", "all", "lora_only")


def check_fields(lora: "LoRA") -> None:
    """Raise unless every field is possible."""
    check_count("rank", lora.rank)
    _check_alpha("alpha", lora.alpha)
    compiled_pattern("targets", lora.targets)
    compiled_pattern("embeddings", lora.embeddings)
    for name in ("exclude", "modules_to_save"):
        if getattr(lora, name) is not None:
            compiled_pattern(name, getattr(lora, name))
    for name in ("use_rslora", "use_dora"):
        if not isinstance(getattr(lora, name), bool):
            raise TypeError(f"{name} must be a bool, got {getattr(lora, name)!r}")
    if not _is_number(lora.dropout) or not 0 <= lora.dropout < 1:
        raise ValueError(f"dropout must be a number from 0 to below 1, got {lora.dropout!r}")
    if lora.bias not in BIASES:
        raise ValueError(f"bias must be one of {', '.join(BIASES)}, got {lora.bias!r}")
    is_sketch = re.fullmatch(r"pissa_niter_\d+", str(lora.init_lora_weights))
    if lora.init_lora_weights not in INITIALIZATIONS and not is_sketch:
        raise ValueError(
            f"init_lora_weights must be one of {', '.join(INITIALIZATIONS)} or pissa_niter_N, got "
            f"{lora.init_lora_weights!r}"
        )
    check_count("loftq_iter", lora.loftq_iter)


def hashable_patterns(name: str, patterns: Any) -> tuple[tuple[str, Any], ...]:
    """A mapping from regular expressions as pairs, each checked."""
    check = {"rank_pattern": check_count, "alpha_pattern": _check_alpha}.get(name, _check_axes)
    return _checked_pairs(name, patterns, check)


def _checked_pairs(
    name: str, patterns: Any, check: Callable[[str, Any], None]
) -> tuple[tuple[str, Any], ...]:
    pairs = patterns.items() if isinstance(patterns, Mapping) else patterns
    try:
        pairs = tuple((pattern, value) for pattern, value in pairs)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be a mapping from regular expressions, got {patterns!r}"
        ) from error
    for pattern, value in pairs:
        compiled_pattern(name, pattern)
        check(f"{name}[{pattern!r}]", value)
    return pairs


def check_count(name: str, count: Any) -> None:
    """Raise unless it is an int of at least 1."""
    if type(count) is not int or count < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {count!r}")


def _check_alpha(name: str, alpha: Any) -> None:
    if not _is_number(alpha) or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {alpha!r}")


def _check_axes(name: str, axes: Any) -> None:
    is_pair = isinstance(axes, tuple) and len(axes) == 2
    if not is_pair or any(type(count) is not int or count < 1 for count in axes):
        raise ValueError(f"{name} must be two ints of at least 1, got {axes!r}")


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
