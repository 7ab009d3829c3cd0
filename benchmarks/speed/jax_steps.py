"""Optimizers of JAX, compiled and with their arrays, ready to step."""

import dataclasses
import functools
import re
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.speed.rounds import Runner, sample
from benchmarks.speed.workloads import (
    Workload,
    examples,
    gradients,
    initial_parameters,
    square,
)

# JAX writes each result over the first donated argument of its shape and dtype, so new parameters
# go where the old ones were, or where the gradients were. Which is better depends on the optimizer.
ORDERS = (("params", "state", "grads"), ("grads", "state", "params"))


@dataclasses.dataclass(frozen=True)
class JaxOptimizer:
    """``init(params) -> state`` and ``apply(grads, state, params) -> (params, state)``."""

    init: Callable[[Any], Any]
    apply: Callable[[Any, Any, Any], tuple[Any, Any]]


def from_optax(tx: optax.GradientTransformation) -> JaxOptimizer:
    """An optimizer whose updates are added with `optax.apply_updates`."""

    def apply(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return JaxOptimizer(tx.init, apply)


class JaxStep(Runner):
    """``update`` and ``apply_updates`` in one compiled function, everything donated.

    Args:
      optimizer: What is compiled.
      workload: Parameters and gradients.
      order: Of the arguments, one of `ORDERS`.
      options: Of the compiler.
    """

    def __init__(
        self,
        optimizer: JaxOptimizer,
        workload: Workload,
        order: Sequence[str] = ORDERS[0],
        options: dict[str, Any] | None = None,
    ):
        self.source = _source(workload)
        params = [jnp.array(leaf) for leaf in initial_parameters(workload)]
        self.held = {"params": params, "state": optimizer.init(params)}
        self.order = order
        self.fill()
        self.nbytes = {name: _nbytes(tree) for name, tree in self.held.items()}

        def step(*arguments: Any) -> tuple[Any, Any]:
            named = dict(zip(order, arguments))
            return optimizer.apply(named["grads"], named["state"], named["params"])

        start = time.perf_counter()
        self.compiled = _compile(step, (0, 1, 2), *self._arguments(), options=options)
        self.step()
        self.first_step = time.perf_counter() - start
        self.details = {"donated": ", ".join(order), **_details(self.compiled)}

    def _arguments(self) -> list[Any]:
        return [self.held[name] for name in self.order]

    def fill(self) -> None:
        """Writes new gradients over the old ones, which the last step may have taken."""
        self.held["grads"] = jax.block_until_ready(_copy(self.source))

    def step(self) -> None:
        """One step."""
        params, state = jax.block_until_ready(self.compiled(*self._arguments()))
        self.held["params"], self.held["state"] = params, state


class JaxTrainingStep(Runner):
    """Loss, gradients and update in one compiled function; state and parameters donated."""

    def __init__(self, optimizer: JaxOptimizer, workload: Workload):
        self.params = [jnp.array(leaf) for leaf in initial_parameters(workload)]
        self.state = optimizer.init(self.params)
        self.batch = tuple(jnp.array(values) for values in examples(workload))
        self.nbytes = {"params": _nbytes(self.params), "state": _nbytes(self.state)}
        self.nbytes["grads"] = self.nbytes["params"]

        def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
            loss, grads = jax.value_and_grad(perceptron_loss)(params, *batch)
            return *optimizer.apply(grads, state, params), loss

        start = time.perf_counter()
        self.compiled = _compile(step, (0, 1), self.params, self.state, self.batch)
        self.step()
        self.first_step = time.perf_counter() - start
        self.details = {"donated": "params, state", **_details(self.compiled)}

    def fill(self) -> None:
        """Nothing: a training step makes its own gradients."""

    def step(self) -> None:
        """One step."""
        self.params, self.state, _ = jax.block_until_ready(
            self.compiled(self.params, self.state, self.batch)
        )


class Bandwidth(Runner):
    """``x + 1`` written over a float32 ``x``: each element is read once and written once.

    Args:
      nbytes: Of ``x``; half of what moves.
    """

    def __init__(self, nbytes: int):
        self.values = jnp.zeros(nbytes // 4, jnp.float32)
        self.compiled = _compile(lambda x: x + 1, (0,), self.values)
        self.nbytes = {"read": self.values.nbytes, "written": self.values.nbytes}
        self.step()

    def fill(self) -> None:
        """Nothing."""

    def step(self) -> None:
        """One pass."""
        self.values = jax.block_until_ready(self.compiled(self.values))


def perceptron_loss(params: Sequence[jax.Array], inputs: jax.Array, targets: jax.Array):
    """Mean squared error of a multilayer perceptron with ReLU."""
    hidden = inputs
    for kernel, bias in zip(params[::2], params[1::2]):
        hidden = jax.nn.relu(hidden) @ kernel + bias[None]
    return jnp.mean((hidden - targets) ** 2)


def start_jax(make: Callable[[], JaxOptimizer], workload: Workload, trial_size: int) -> Runner:
    """A runner for ``workload``, its arguments in the order that is faster.

    Args:
      make: Makes the optimizer.
      workload: A training step if it has a batch, else an optimizer step alone.
      trial_size: The orders are tried on one square matrix of this size.
    """
    optimizer = make()
    if workload.batch:
        return JaxTrainingStep(optimizer, workload)
    return JaxStep(optimizer, workload, faster_order(make, trial_size))


@functools.cache
def faster_order(make: Callable[[], JaxOptimizer], size: int) -> tuple[str, ...]:
    """That of `ORDERS` in which a step took the least time, of nine tries in turns."""
    optimizer = make()
    runners = {order: JaxStep(optimizer, square(size), order) for order in ORDERS}
    seconds = {order: [] for order in ORDERS}
    for _ in range(9):
        for order, runner in runners.items():
            seconds[order].append(sample(runner, 1))
    return min(ORDERS, key=lambda order: min(seconds[order]))


def _compile(
    function: Callable[..., Any],
    donated: Sequence[int],
    *arguments: Any,
    options: dict[str, Any] | None = None,
) -> Any:
    with warnings.catch_warnings():
        # No mistake here: which arrays a result can be written over is what `ORDERS` try.
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
        return lowered.compile(compiler_options=options)


_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


@functools.cache
def _source(workload: Workload) -> list[jax.Array]:
    return [jnp.asarray(leaf) for leaf in gradients(workload)]


def _nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))


def _details(compiled: Any) -> dict[str, Any]:
    """Which custom calls a program makes, and the size of its temporaries."""
    calls = set(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text()))
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return {"custom calls": sorted(calls), "temporary bytes": temporaries}
