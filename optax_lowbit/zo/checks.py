"""Arguments of zeroth-order optimizers, checked where they are given."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from optax_lowbit.moments.policy import compiled_pattern
from optax_lowbit.zo.estimators import Estimator, ForwardGradient
from optax_lowbit.zo.noise import Noise


def check_optimizer(optimizer: Any) -> None:
    """Raises TypeError or ValueError if a field is impossible."""
    for name in ("num_probes", "probe_batch"):
        check_count(name, getattr(optimizer, name))
    for name in ("learning_rate", "eps", "weight_decay"):
        check_number(name, getattr(optimizer, name))
    if is_concrete(optimizer.eps) and not 0 < optimizer.eps < np.inf:
        raise ValueError(f"eps must be above 0 and finite, got {optimizer.eps!r}")
    if is_concrete(optimizer.learning_rate) and not np.isfinite(optimizer.learning_rate):
        raise ValueError(f"learning_rate must be finite, got {optimizer.learning_rate!r}")
    if is_concrete(optimizer.weight_decay) and not optimizer.weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {optimizer.weight_decay!r}")
    check_clip(optimizer.clip)
    if optimizer.active_probes is not None and not callable(optimizer.active_probes):
        raise TypeError(
            f"active_probes must be a schedule or None, got {optimizer.active_probes!r}; a fixed "
            f"number of probes is num_probes"
        )
    check_noise(optimizer.noise)
    if not isinstance(optimizer.estimator, Estimator | ForwardGradient):
        raise TypeError(
            f"estimator must be an Estimator, such as Central(), got {optimizer.estimator!r}"
        )
    is_joint = optimizer.estimator.least_probes > 1 or not optimizer.spreads_probes
    if optimizer.probe_axis is not None and is_joint:
        raise ValueError(
            "probe_axis must be None where coefficients depend on all probes, as in fzoo, hizoo"
        )
    if optimizer.active_probes is not None and optimizer.probe_axis is not None:
        raise ValueError(
            "active_probes must be None where probes are spread over devices, each of which "
            "evaluates as many as the others"
        )
    for name in ("trainable", "weight_decay_mask"):
        check_choice(name, getattr(optimizer, name))


def check_clip(clip: Any) -> None:
    """Raises TypeError or ValueError unless ``clip`` is a number above 0 or None."""
    message = f"clip must be a number above 0 or None, got {clip!r}"
    if clip is not None and not _is_scalar(clip):
        raise TypeError(message)
    if clip is not None and is_concrete(clip) and not clip > 0:
        raise ValueError(message)


def check_noise(noise: Any) -> None:
    """Raises TypeError unless ``noise`` is one."""
    if not isinstance(noise, Noise):
        raise TypeError(f"noise must be a Noise, such as Rademacher(), got {noise!r}")


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is an int of at least 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def check_number(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a real scalar or a schedule."""
    if not callable(value) and not _is_scalar(value):
        raise TypeError(f"{name} must be a number or a schedule, got {value!r}")


def _is_scalar(value: Any) -> bool:
    is_number = isinstance(value, int | float | np.number | np.ndarray | jax.Array)
    return is_number and not jnp.ndim(value) and not isinstance(value, bool)


def check_decay_rate(name: str, value: Any) -> None:
    """Raises unless ``value`` is a number from 0 to below 1."""
    if callable(value):
        raise TypeError(f"{name} must be a number, got the schedule {value!r}")
    check_number(name, value)
    if is_concrete(value) and not 0 <= value < 1:
        raise ValueError(f"{name} must be from 0 to below 1, got {value!r}")


def check_choice(name: str, choice: Any) -> None:
    """Raises unless ``choice`` is a regular expression, a predicate or None."""
    if isinstance(choice, str):
        compiled_pattern(name, choice)
    elif choice is not None and not callable(choice):
        raise TypeError(
            f"{name} must be a regular expression, a predicate of path and leaf, or None, "
            f"got {type(choice).__name__}"
        )


def check_moments(moments: Mapping[str, Any], leaves: int) -> None:
    """Raises ValueError if moments are of another number of leaves than train."""
    for name, column in moments.items():
        if len(column) != leaves:
            raise ValueError(
                f"state must be that of these params: its {name} is of {len(column)} leaves, and "
                f"{leaves} train"
            )


def is_concrete(value: Any) -> bool:
    """Whether it is a number that is known now."""
    return not callable(value) and not isinstance(value, jax.core.Tracer)


def is_zero(value: Any) -> bool:
    """Whether it is known to be zero."""
    return is_concrete(value) and value == 0


def scalar_loss(loss_fn: Callable[..., Any], args: tuple[Any, ...], params: Any) -> jax.Array:
    """``loss_fn(params, *args)`` in float32.

    Raises:
      TypeError: If it is not a real scalar.

    Warns:
      UserWarning: If it has 16 bits, in which most differences between two probes are lost.
    """
    loss = loss_fn(params, *args)
    kind = type(loss).__name__
    if not jax.tree_util.all_leaves([loss]):
        raise TypeError(
            f"loss_fn must give a float of shape () and nothing beside it, got a {kind}"
        )
    shape, dtype = jnp.shape(loss), jnp.result_type(loss)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"loss_fn must give a float of shape (), got {dtype} of shape {shape}")
    if dtype.itemsize < 4:
        warnings.warn(
            f"loss_fn gives {dtype}, whose last place may be larger than what probes change: take "
            f"its mean in float32",
            stacklevel=2,
        )
    return jnp.asarray(loss, jnp.float32)
