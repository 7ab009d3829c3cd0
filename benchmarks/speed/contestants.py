"""Who is compared: optax, optax_lowbit, and the low-bit optimizers of others.

All have the same hyperparameters. A peer is imported only where it is run.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

import optax_lowbit
from benchmarks.speed.jax_steps import JaxOptimizer, from_optax, start_jax
from benchmarks.speed.rounds import Runner
from benchmarks.speed.workloads import Workload

RATE, BETAS, EPSILON, DECAY, MOMENTUM = 1e-3, (0.9, 0.999), 1e-8, 1e-4, 0.9
ADAM: dict[str, Any] = {"b1": BETAS[0], "b2": BETAS[1], "eps": EPSILON, "weight_decay": DECAY}
TORCH_ADAM: dict[str, Any] = {"lr": RATE, "betas": BETAS, "eps": EPSILON, "weight_decay": DECAY}

UPDATES = frozenset({"matrix", "large", "tree", "scaling"})
EVERYTHING = UPDATES | {"training", "memory", "threads"}
NATIVE = EVERYTHING | {"instructions"}
BASELINE = "optax.adamw, float32"


@dataclasses.dataclass(frozen=True)
class Contestant:
    """An optimizer that is timed.

    Attributes:
      name: In the tables.
      make: ``make()`` gives a `JaxOptimizer`, or ``make(parameters)`` one of PyTorch.
      parts: The parts of the benchmark that it is in.
      peers: Distributions it needs beside optax_lowbit's own.
      framework: ``"jax"`` or ``"torch"``.
      reference: Name of the optimizer with float32 state that does the same.
    """

    name: str
    make: Callable[..., Any]
    parts: frozenset[str] = EVERYTHING
    peers: tuple[str, ...] = ()
    framework: str = "jax"
    reference: str = BASELINE

    def missing(self) -> list[str]:
        """Those of `peers` that are not installed."""
        return [peer for peer in self.peers if installed_version(peer) is None]

    def start(self, workload: Workload, trial_size: int) -> Runner:
        """A runner for ``workload``; ``trial_size`` as in `start_jax`."""
        if self.framework == "jax":
            return start_jax(self.make, workload, trial_size)
        from benchmarks.speed.torch_steps import start_torch

        return start_torch(self.make, workload)


def installed_version(distribution: str) -> str | None:
    """The version of ``distribution``, None if it isn't installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _adamw() -> JaxOptimizer:
    return from_optax(optax.adamw(RATE, **ADAM))


def _adamw_bfloat16() -> JaxOptimizer:
    return from_optax(optax.adamw(RATE, **ADAM, mu_dtype=jnp.bfloat16))


def _rank1() -> optax.GradientTransformation:
    return optax_lowbit.adamw4bit(RATE, **ADAM)


def _block() -> optax.GradientTransformation:
    spec = optax_lowbit.QuantSpec(codebook="linear", bits=4, signed=False, scaling="block")
    return optax_lowbit.adamw4bit(RATE, **ADAM, nu_spec=spec)


def _fused(make: Callable[[], optax.GradientTransformation]) -> Callable[[], JaxOptimizer]:
    def make_fused() -> JaxOptimizer:
        tx = make()

        def apply(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
            return optax_lowbit.fused_apply(tx, grads, state, params)

        return JaxOptimizer(tx.init, apply)

    return make_fused


def _factor() -> JaxOptimizer:
    return from_optax(optax_lowbit.factor4bit(RATE, **ADAM))


def _adamw8bit() -> JaxOptimizer:
    return from_optax(optax_lowbit.adamw8bit(RATE, **ADAM))


def _flash() -> JaxOptimizer:
    import flashoptim_jax  # pyright: ignore[reportMissingImports]

    # Its fused kernels are for NVIDIA. Parameters in float32 need no bits beside them.
    flash = flashoptim_jax.flash_adamw(RATE, **ADAM, fused=False, master_weight_bits=None)
    return JaxOptimizer(flash.init, lambda grads, state, params: flash.step(params, state, grads))


def _torch(params: list[Any]) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    return torch.optim.AdamW(params, **TORCH_ADAM, fused=True)


def _torch_sgd(params: list[Any]) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    return torch.optim.SGD(params, lr=RATE, fused=True)


def _torchao(name: str) -> Callable[[list[Any]], Any]:
    def make(params: list[Any]) -> Any:
        import torch  # pyright: ignore[reportMissingImports]
        import torchao.optim  # pyright: ignore[reportMissingImports]

        torch.compile(torch.neg)(torch.ones(8))  # starts the compiler before it is timed
        return getattr(torchao.optim, name)(params, **TORCH_ADAM)

    return make


def _bitsandbytes(params: list[Any]) -> Any:
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    return bitsandbytes.optim.AdamW8bit(params, **TORCH_ADAM)


def _sgd() -> JaxOptimizer:
    return from_optax(optax.sgd(RATE, momentum=MOMENTUM))


def _sgd4bit() -> JaxOptimizer:
    return from_optax(optax_lowbit.sgd4bit(RATE, momentum=MOMENTUM))


TORCHAO = ("torchao", "torch")
SLOW = frozenset({"matrix", "memory"})  # hundreds of milliseconds a step and more
SGD = "optax.sgd with momentum, float32"
SGD_4BIT = "sgd4bit"
FUSED_BLOCK = "adamw4bit, nu in blocks, fused_apply"
TORCH = "torch AdamW(fused=True), float32"
# The least an optimizer can do, by framework: what a step takes beyond theirs is the optimizer's.
PLAIN = {"jax": "optax.sgd, no momentum", "torch": "torch SGD, no momentum"}

CONTESTANTS = (
    Contestant(BASELINE, _adamw, NATIVE),
    Contestant("optax.adamw, mu in bfloat16", _adamw_bfloat16),
    Contestant("adamw4bit", lambda: from_optax(_rank1()), NATIVE),
    Contestant("adamw4bit, fused_apply", _fused(_rank1), NATIVE),
    Contestant("adamw4bit, nu in blocks", lambda: from_optax(_block()), NATIVE),
    Contestant(FUSED_BLOCK, _fused(_block), NATIVE),
    Contestant("factor4bit", _factor),
    Contestant("adamw8bit", _adamw8bit),
    Contestant(SGD, _sgd, reference=SGD),
    Contestant(SGD_4BIT, _sgd4bit, reference=SGD),
    Contestant("flashoptim-jax flash_adamw, 8 bits", _flash, peers=("flashoptim-jax",)),
    Contestant(TORCH, _torch, peers=("torch",), framework="torch"),
    Contestant("torchao AdamW8bit", _torchao("AdamW8bit"), SLOW, TORCHAO, "torch"),
    Contestant("torchao AdamW4bit", _torchao("AdamW4bit"), SLOW, TORCHAO, "torch"),
    Contestant("bitsandbytes AdamW8bit", _bitsandbytes, SLOW, ("bitsandbytes", "torch"), "torch"),
    Contestant(
        PLAIN["jax"], lambda: from_optax(optax.sgd(RATE)), frozenset({"training"}), reference=SGD
    ),
    Contestant(
        PLAIN["torch"], _torch_sgd, frozenset({"training"}), ("torch",), "torch", reference=SGD
    ),
)
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}
