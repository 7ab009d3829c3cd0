"""The optimizers that can be compared, by name."""

import importlib
from dataclasses import dataclass, field
from typing import Any

import optax

from examples.llm.errors import UsageError


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer's factory and the settings under which it fine-tunes well.

    Attributes:
      module: module that holds the factory; its name is the key in `OPTIMIZERS`.
      learning_rate: peak learning rate unless the user gives another.
      options: further arguments of the factory.
    """

    module: str
    learning_rate: float
    options: dict[str, Any] = field(default_factory=dict)


_MOMENTUM = {"momentum": 0.9}

OPTIMIZERS = {
    "adamw": OptimizerChoice("optax", 5e-5),
    "adam": OptimizerChoice("optax", 5e-5),
    "sgd": OptimizerChoice("optax", 5e-3, _MOMENTUM),
    "adamw8bit": OptimizerChoice("optax_lowbit", 5e-5),
    "adam8bit": OptimizerChoice("optax_lowbit", 5e-5),
    "sgd8bit": OptimizerChoice("optax_lowbit", 5e-3, _MOMENTUM),
    "adamw4bit": OptimizerChoice("optax_lowbit", 5e-5),
    "adam4bit": OptimizerChoice("optax_lowbit", 5e-5),
    "factor4bit": OptimizerChoice("optax_lowbit", 5e-5),
    "sgd4bit": OptimizerChoice("optax_lowbit", 5e-3, _MOMENTUM),
}


def check_optimizer_names(names: tuple[str, ...]) -> None:
    """Raise a `UsageError` unless `names` are known, different from each other, and not none."""
    if not names:
        raise UsageError(f"--optimizer: give at least one of {', '.join(OPTIMIZERS)}")
    for name in names:
        if name not in OPTIMIZERS:
            raise UsageError(
                f"--optimizer: {name!r} is unknown, choose from {', '.join(OPTIMIZERS)}"
            )
    if len(set(names)) < len(names):
        raise UsageError(f"--optimizer: a name is given twice in {' '.join(names)}")


def learning_rate_schedule(peak: float, steps: int) -> optax.Schedule:
    """Return a linear warmup over a tenth of `steps` to `peak`, then a cosine down to a tenth."""
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / 10,
        peak_value=peak,
        warmup_steps=steps // 10,
        decay_steps=steps,
        end_value=peak / 10,
    )


def build_optimizer(name: str, peak: float, steps: int) -> optax.GradientTransformation:
    """Build the optimizer called `name` for a run of `steps` steps."""
    choice = OPTIMIZERS[name]
    factory = getattr(importlib.import_module(choice.module), name)
    return factory(learning_rate_schedule(peak, steps), **choice.options)
