"""The ways to train, by name: first-order optimizers and zeroth-order methods."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from inspect import signature
from typing import Any, Literal, NamedTuple, Protocol

import jax
import optax

import optax_lowbit
from examples.llm.errors import UsageError
from examples.llm.training.accumulation import Loss, loss_and_gradients
from optax_lowbit import zo

Schedule = Literal["cosine", "constant"]


class Optimizer(Protocol):
    """Takes steps on a loss `loss_fn(parameters, *args)`: what zeroth-order optimizers are."""

    def init(self, params: Any, key: Any) -> Any:
        """The state before the first step; `key` is a seed."""
        ...

    def step(self, loss_fn: Loss, params: Any, state: Any, *args: Any) -> tuple[Any, Any, Any]:
        """New parameters, new state, and something that has the `loss`."""
        ...


class LossInfo(NamedTuple):
    """What a first-order step tells.

    Attributes:
      loss: float32 `()`, at the parameters before the step.
    """

    loss: jax.Array


@dataclass(frozen=True)
class FirstOrder:
    """An Optax transformation and backpropagation, as an `Optimizer`."""

    transformation: optax.GradientTransformation

    def init(self, params: Any, key: Any) -> Any:
        """The transformation's state."""
        del key
        return self.transformation.init(params)

    def step(self, loss_fn: Loss, params: Any, state: Any, *args: Any) -> tuple[Any, Any, LossInfo]:
        """Backpropagate, transform, add."""
        loss, gradients = loss_and_gradients(loss_fn, params, *args)
        updates, state = self.transformation.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, LossInfo(loss)


@dataclass(frozen=True)
class Hyperparameters:
    """What a method is built with.

    Attributes:
      learning_rate: the peak where there is a schedule; a number, or traced by JAX.
      eps: how far a zeroth-order method probes.
      steps: of the run.
      tuning: scheme of tuning.
      schedule: of the learning rate of a first-order method.
      clip_norm: the largest norm of all gradients together that such a method is given; None for
        any.
      backend: of the kernels of low-bit methods; those of a platform that is not at hand have to
        be named.
    """

    learning_rate: Any
    eps: float
    steps: int
    tuning: str = "full"
    schedule: Schedule = "cosine"
    clip_norm: float | None = None
    backend: str = "auto"


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
      build: makes the optimizer.
      learning_rates: by each scheme of tuning that it can be used with, unless the user gives
        another.
      forward_passes: evaluations of the loss in a step, by scheme.
      derivative: how a step differentiates the loss, in a word: `backward` if by backpropagation
        through everything; empty if not at all.
    """

    build: Callable[[Hyperparameters], Optimizer]
    learning_rates: Mapping[str, float]
    forward_passes: Mapping[str, int]
    derivative: str = ""

    @property
    def probes(self) -> bool:
        """Whether steps of a length `eps` tell how the loss changes, somewhere in the model."""
        return self.derivative not in ("backward", "jvp")


# How far zeroth-order methods probe, by scheme: MeZO's (arXiv 2305.17333, appendix E.3).
EPS = {"full": 1e-3, "lora": 1e-2, "qlora": 1e-2, "prefix": 1e-1, "prompt": 1e-1}


def learning_rate_schedule(peak: Any, steps: int) -> optax.Schedule:
    """Return a linear warmup over a tenth of `steps` to `peak`, then a cosine down to a tenth.

    `peak` may be traced, so that a step compiles once for all learning rates.
    """
    share = optax.warmup_cosine_decay_schedule(
        init_value=0.1,
        peak_value=1.0,
        warmup_steps=steps // 10,
        decay_steps=steps,
        end_value=0.1,
    )
    return lambda count: peak * share(count)


def _first_order(
    factory: Callable[..., Any], rate: float, *, decays: bool = False, **options: Any
) -> Method:
    """An optimizer under the schedule above, or a constant rate."""

    def build(chosen: Hyperparameters) -> Optimizer:
        rate = chosen.learning_rate
        if chosen.schedule == "cosine":
            rate = learning_rate_schedule(rate, chosen.steps)
        # The QLoRA paper's program has no weight decay.
        decay = {"weight_decay": 0.0} if decays and chosen.tuning == "qlora" else {}
        transformation = factory(rate, **options, **decay, **_kernels(factory, chosen))
        if chosen.clip_norm is not None:
            clip = optax.clip_by_global_norm(chosen.clip_norm)
            transformation = optax.chain(clip, transformation)
        return FirstOrder(transformation)

    # A small tree of new parameters takes, and needs, larger steps.
    rates = {"full": rate, "lora": 20 * rate, "qlora": _QLORA_RATE * rate / _ADAM_RATE,
             "prefix": 20 * rate, "prompt": 20 * rate}  # fmt: skip
    return Method(build, rates, dict.fromkeys(rates, 1), derivative="backward")


def _kernels(factory: Callable[..., Any], chosen: Hyperparameters) -> dict[str, str]:
    """The argument that names them, for those that have it."""
    return {"backend": chosen.backend} if "backend" in signature(factory).parameters else {}


def _paged(factory: Callable[..., Any]) -> Callable[..., Any]:
    """An optimizer whose state is on the host."""

    @wraps(factory)
    def build(rate: Any, **options: Any) -> optax.GradientTransformation:
        return optax_lowbit.offload(factory(rate, **options))

    return build


def _sm3(rate: Any, momentum: float) -> optax.GradientTransformation:
    """`optax.sm3`, which takes no schedule."""
    return optax.chain(optax.scale_by_sm3(momentum), optax.scale_by_learning_rate(rate))


def _zeroth_order(
    factory: Callable[..., Optimizer], rates: Mapping[str, float], forward_passes: int = 2
) -> Method:
    """A method of `optax_lowbit.zo`, at a constant learning rate."""

    def build(chosen: Hyperparameters) -> Optimizer:
        return factory(chosen.learning_rate, chosen.eps, **_kernels(factory, chosen))

    return Method(build, rates, dict.fromkeys(rates, forward_passes))


def _forward_gradient(rates: Mapping[str, float]) -> Method:
    """Exact directional derivatives: there is no `eps`."""

    def build(chosen: Hyperparameters) -> Optimizer:
        return zo.forward_grad(chosen.learning_rate)

    return Method(build, rates, dict.fromkeys(rates, 1), derivative="jvp")


# What is probed and updated together, by scheme: parts of all layers, since those are stacked.
_BLOCKS = {
    "full": ("embedding|positions|token_types|head|norm", "attention/", "feed_forward/"),
    "lora": ("query", "value|head"),
    "qlora": ("attention/", "feed_forward/|head"),
    "prefix": ("keys", "values|head"),
}


def _blockwise(rates: Mapping[str, float]) -> Method:
    """MeZO, one block after the other."""

    def build(chosen: Hyperparameters) -> Optimizer:
        return zo.blockwise(zo.zo_sgd(chosen.learning_rate, chosen.eps), _BLOCKS[chosen.tuning])

    passes = {scheme: 2 * len(blocks) for scheme, blocks in _BLOCKS.items()}
    return Method(build, {scheme: rates[scheme] for scheme in _BLOCKS}, passes)


def _hybrid(rate: float) -> Method:
    """Adam for what comes after the layers, whose backpropagation stops there; MeZO before it."""

    def build(chosen: Hyperparameters) -> Optimizer:
        probed = zo.zo_sgd(chosen.learning_rate, chosen.eps)
        adam = optax.adam(chosen.learning_rate * (_ADAM_RATE / rate))
        return zo.hybrid(probed, adam, first_order="^(final_norm|head)/")

    return Method(build, {"full": rate}, {"full": 2}, derivative="last backward")


_ADAM_RATE, _SGD_RATE, _SM3_RATE = 5e-5, 5e-3, 5e-3
_QLORA_RATE = 2e-4  # of AdamW up to 13B parameters, arXiv 2305.14314, table 9
_MOMENTUM: dict[str, Any] = {"momentum": 0.9}
_MEZO_RATES = {"full": 1e-6, "lora": 1e-4, "qlora": 1e-4, "prefix": 1e-3, "prompt": 1e-3}
# Of methods whose steps are as long as the learning rate, however steep the loss is.
_SIGN_RATES = {"full": 1e-5, "lora": 1e-3, "qlora": 1e-3, "prefix": 1e-2, "prompt": 1e-2}

METHODS: dict[str, Method] = {
    "adamw": _first_order(optax.adamw, _ADAM_RATE, decays=True),
    "adam": _first_order(optax.adam, _ADAM_RATE),
    "sgd": _first_order(optax.sgd, _SGD_RATE, **_MOMENTUM),
    # As in the comparison of arXiv 2309.01507, table 2: rates that no parameter's size scales.
    "adafactor": _first_order(
        partial(optax.adafactor, multiply_by_parameter_scale=False, **_MOMENTUM), _ADAM_RATE
    ),
    "sm3": _first_order(_sm3, _SM3_RATE, **_MOMENTUM),
    "adamw8bit": _first_order(optax_lowbit.adamw8bit, _ADAM_RATE, decays=True),
    "adam8bit": _first_order(optax_lowbit.adam8bit, _ADAM_RATE),
    "sgd8bit": _first_order(optax_lowbit.sgd8bit, _SGD_RATE, **_MOMENTUM),
    "adamw4bit": _first_order(optax_lowbit.adamw4bit, _ADAM_RATE, decays=True),
    "adam4bit": _first_order(optax_lowbit.adam4bit, _ADAM_RATE),
    "factor4bit": _first_order(optax_lowbit.factor4bit, _ADAM_RATE),
    "sgd4bit": _first_order(optax_lowbit.sgd4bit, _SGD_RATE, **_MOMENTUM),
    "paged-adamw": _first_order(_paged(optax.adamw), _ADAM_RATE, decays=True),
    "paged-adamw8bit": _first_order(_paged(optax_lowbit.adamw8bit), _ADAM_RATE, decays=True),
    "paged-adamw4bit": _first_order(_paged(optax_lowbit.adamw4bit), _ADAM_RATE, decays=True),
    "mezo": _zeroth_order(zo.zo_sgd, _MEZO_RATES),
    "zo-momentum": _zeroth_order(zo.zo_sgd_momentum, _MEZO_RATES),
    "zo-sign": _zeroth_order(zo.zo_sgd_sign, _SIGN_RATES),
    "zo-adam": _zeroth_order(zo.zo_adam, _SIGN_RATES),
    "zo-conservative": _zeroth_order(zo.zo_sgd_conservative, _MEZO_RATES, 5),
    "fzoo": _zeroth_order(zo.fzoo, _MEZO_RATES, 9),
    "hizoo": _zeroth_order(partial(zo.hizoo, curvature="difference"), _MEZO_RATES, 3),
    "lozo": _zeroth_order(zo.lozo, _MEZO_RATES),
    "sparse": _zeroth_order(
        partial(zo.zo_sgd, noise=zo.RandomMask(zo.Rademacher(), ratio=0.5, interval=1)), _MEZO_RATES
    ),
    # Sparse-MeZO, whose masks live longer than a short run.
    "sparse-mezo": _zeroth_order(
        partial(zo.zo_sgd, noise=zo.MagnitudeMask(zo.Rademacher(), ratio=0.75, interval=1000)),
        _MEZO_RATES,
    ),
    "forward-grad": _forward_gradient(_MEZO_RATES),
    "blockwise": _blockwise(_MEZO_RATES),
    "hybrid": _hybrid(1e-6),
}


def check_tuning(method: str, tuning: str) -> None:
    """Raise a `UsageError` if `method` can't be used with a scheme of tuning."""
    schemes = METHODS[method].learning_rates
    if tuning not in schemes:
        raise UsageError(f"--tuning: {method} is for {', '.join(schemes)}, not for {tuning}")


def check_method_names(names: tuple[str, ...]) -> None:
    """Raise a `UsageError` unless `names` are known, different from each other, and not none."""
    if not names:
        raise UsageError(f"--method: give at least one of {', '.join(METHODS)}")
    for name in names:
        if name not in METHODS:
            raise UsageError(f"--method: {name!r} is unknown, choose from {', '.join(METHODS)}")
    if len(set(names)) < len(names):
        raise UsageError(f"--method: a name is given twice in {' '.join(names)}")
