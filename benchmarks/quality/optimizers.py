"""The optimizers that are compared."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

import optax_lowbit
from optax_lowbit import QuantSpec


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer by name; ``make(learning_rate, key)``, the key being for stochastic rounding."""

    name: str
    make: Callable[[optax.Schedule, jax.Array], optax.GradientTransformation]
    family: str = "adamw"  # the float32 optimizer whose learning rate it takes


def _adamw4bit(**specs: Any) -> Callable[..., optax.GradientTransformation]:
    return lambda rate, key: optax_lowbit.adamw4bit(rate, key=key, **specs)


def _second_moment(codebook: str, scaling: Any, rounding: Any = "nearest") -> QuantSpec:
    return QuantSpec(codebook=codebook, bits=4, signed=False, scaling=scaling, rounding=rounding)


DEFAULT = "adamw4bit"
SIGNED_SCALE = QuantSpec(
    codebook="dynamic_exponent", bits=4, signed=True, scaling="block", signed_scale=True
)
STOCHASTIC = _second_moment("linear", "rank1", "stochastic")

BASELINES = (
    Optimizer("optax.adamw, float32", lambda rate, key: optax.adamw(rate)),
    Optimizer("adamw8bit", lambda rate, key: optax_lowbit.adamw8bit(rate)),
    Optimizer(DEFAULT, _adamw4bit()),
    Optimizer("factor4bit", lambda rate, key: optax_lowbit.factor4bit(rate)),
)
ABLATION = (
    Optimizer("nu: linear, block 128", _adamw4bit(nu_spec=_second_moment("linear", "block"))),
    Optimizer(
        "nu: dynamic exponent without zero, block 128",
        _adamw4bit(nu_spec=_second_moment("dynamic_exponent_nozero", "block")),
    ),
    Optimizer(
        "nu: dynamic exponent with zero, block 128",
        _adamw4bit(nu_spec=_second_moment("dynamic_exponent", "block")),
    ),
)
VARIANTS = (
    Optimizer("mu: signed scale", _adamw4bit(mu_spec=SIGNED_SCALE)),
    Optimizer("nu: stochastic rounding", _adamw4bit(nu_spec=STOCHASTIC)),
    Optimizer(
        "mu: signed scale, nu: stochastic rounding",
        _adamw4bit(mu_spec=SIGNED_SCALE, nu_spec=STOCHASTIC),
    ),
)
SGD = (
    Optimizer("optax.sgd, float32", lambda rate, key: optax.sgd(rate, momentum=0.9), "sgd"),
    Optimizer("sgd4bit", lambda rate, key: optax_lowbit.sgd4bit(rate, momentum=0.9), "sgd"),
)
GROUPS = (BASELINES, ABLATION, VARIANTS, SGD)
