"""Training on a task, all seeds at once."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.quality.figures import shown, summary
from benchmarks.quality.optimizers import Optimizer
from benchmarks.quality.tasks import Data, Params, Task, Values, higher_is_better

SWEEP_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run follows from beside its optimizer; stacked, seed by seed, on a first axis.

    Attributes:
      params: Initial parameters.
      chosen: int32 ``(steps, batch)``, the batches.
      key: For stochastic rounding.
    """

    params: Params
    chosen: jax.Array
    key: jax.Array


def start_runs(task: Task, seeds: Sequence[int]) -> Start:
    """The starts of ``seeds``."""

    def one(seed: jax.Array) -> tuple[Params, jax.Array, jax.Array]:
        init_key, batch_key, noise_key = jax.random.split(jax.random.key(seed), 3)
        shape = (task.steps, task.batch_size)
        return task.init(init_key), jax.random.randint(batch_key, shape, 0, task.choices), noise_key

    return Start(*jax.vmap(one)(jnp.array(seeds, jnp.int32)))


def train(
    task: Task, optimizer: Optimizer, data: Data,
    params: Params, chosen: jax.Array, key: jax.Array, peak: jax.Array,
) -> tuple[Params, jax.Array]:  # fmt: skip
    """Trains once, from what a :class:`Start` has for one seed.

    Args:
      task, optimizer: What to train, and how.
      data: To train on.
      params, chosen, key: As in :class:`Start`.
      peak: The highest learning rate, float32, 0-d: reached after a tenth of the steps, then a
        cosine down to 0.

    Returns:
      The last parameters and the loss of each batch, ``(steps,)``.
    """

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.asarray(count, jnp.float32) + 1
        warmup = max(task.steps // 10, 1)
        decay = 0.5 * (1 + jnp.cos(jnp.pi * (done - warmup) / (task.steps + 1 - warmup)))
        return peak * jnp.where(done < warmup, done / warmup, decay)

    tx = optimizer.make(rate, key)

    def step(carry: tuple[Any, Any], chosen: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        loss, grads = jax.value_and_grad(task.loss)(params, *task.take(data, chosen))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), chosen)
    return params, losses


def measure(
    task: Task, optimizer: Optimizer, data: Data, start: Start, peaks: Sequence[float]
) -> Values:
    """Trains the runs of ``start`` side by side, each with its learning rate.

    Returns:
      The metrics of ``data`` after the last step, and ``"train loss"``: the mean over the batches
      of the last tenth of the steps.
    """
    trained = jax.vmap(functools.partial(train, task, optimizer), in_axes=(None, 0, 0, 0, 0))
    rates = jnp.array(peaks, jnp.float32)
    params, losses = jax.jit(trained)(task.train, start.params, start.chosen, start.key, rates)
    metrics = evaluator(task.evaluate)(params, data)
    metrics["train loss"] = losses[:, -max(task.steps // 10, 1) :].mean(1)
    return {name: np.asarray(values, np.float64).tolist() for name, values in metrics.items()}


@functools.cache
def evaluator(evaluate: Callable[[Params, Data], dict[str, jax.Array]]) -> Callable[..., Any]:
    """``evaluate`` for parameters stacked on a first axis, compiled once."""
    return jax.jit(jax.vmap(evaluate, in_axes=(0, None)))


def sweep(task: Task, optimizer: Optimizer) -> dict[str, Any]:
    """Validation values of ``task.metric`` by learning rate, and the best rate, of another seed."""
    rates = task.sweeps[optimizer.family]
    if len(rates) == 1:
        return {"best": rates[0], "tried": {}}
    start = start_runs(task, [SWEEP_SEED] * len(rates))
    values = measure(task, optimizer, task.validation, start, rates)[task.metric]
    sign = 1 if higher_is_better(task.metric) else -1
    order = [sign * value if math.isfinite(value) else -math.inf for value in values]
    return {"best": rates[order.index(max(order))], "tried": dict(zip(map(str, rates), values))}


def state_bytes(task: Task, optimizer: Optimizer) -> float:
    """Bytes of the optimizer's buffers for each parameter."""
    params = task.init(jax.random.key(0))
    state = optimizer.make(lambda count: jnp.float32(0), jax.random.key(0)).init(params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / count


def run_task(task: Task, groups: Sequence[Sequence[Optimizer]], seeds: Sequence[int]) -> dict:
    """All optimizers that ``task`` has a sweep for; the first of a family brings the rate."""
    rates: dict[str, dict[str, Any]] = {}
    results = {}
    start = start_runs(task, seeds)
    for optimizer in (member for group in groups for member in group):
        if optimizer.family not in task.sweeps:
            continue
        started = time.perf_counter()
        if optimizer.family not in rates:
            rates[optimizer.family] = sweep(task, optimizer)
        peaks = [rates[optimizer.family]["best"]] * len(seeds)
        metrics = measure(task, optimizer, task.test, start, peaks)
        results[optimizer.name] = {
            "state bytes a parameter": state_bytes(task, optimizer),
            "metrics": {name: summary(values) for name, values in metrics.items()},
        }
        value = shown(results[optimizer.name]["metrics"][task.metric])
        seconds = time.perf_counter() - started
        print(f"{task.name}: {optimizer.name}: {task.metric} {value} ({seconds:.0f} s)", flush=True)
    return {
        "about": task.about,
        "metric": task.metric,
        "steps": task.steps,
        "batch": task.batch_size,
        "rates": rates,
        "optimizers": results,
    }
