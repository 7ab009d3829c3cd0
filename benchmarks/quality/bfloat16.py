"""Training with bfloat16 parameters: rounded to nearest, at random, with 8 more bits.

``python -m benchmarks.quality.bfloat16`` prints the table of `docs/composing.md`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.quality.figures import shown, summary
from benchmarks.quality.tasks import Params, Task, digits
from optax_lowbit import adamw4bit, apply_updates_stochastic, correct_bfloat16, split_bfloat16

STEPS, PEAK, SEEDS = 1500, 3e-4, (0, 1, 2)

Apply = Callable[[Any, Any, jax.Array], Any]


def optimizer(*last: optax.GradientTransformation) -> optax.GradientTransformation:
    """AdamW with 4-bit moments, its learning rate falling to 0 by a cosine."""
    return optax.chain(adamw4bit(optax.cosine_decay_schedule(PEAK, STEPS)), *last)


def rounded(weights: Params) -> Params:
    """Weights in bfloat16."""
    return jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)


def to_nearest(params: Any, updates: Any, key: jax.Array) -> Any:
    """What optax does."""
    del key
    return optax.apply_updates(params, updates)


def run(task: Task, seed: int, way: str) -> tuple[float, float]:
    """Loss on all examples of training, and accuracy on those of the test, after training."""
    init_key, batch_key, noise_key = jax.random.split(jax.random.key(seed), 3)
    weights = task.init(init_key)
    apply: Apply = apply_updates_stochastic if way == "stochastic" else to_nearest
    tx = optimizer(correct_bfloat16()) if way == "24 bits" else optimizer()
    params = weights if way == "float32" else rounded(weights)
    state: Any = tx.init(params)
    if way == "24 bits":
        params, corrected = split_bfloat16(weights)
        state = (*state[:-1], corrected)

    def step(carry, number):
        params, state = carry
        chosen = jax.random.randint(
            jax.random.fold_in(batch_key, number), (task.batch_size,), 0, task.choices
        )
        # In float32, gradients too: only how parameters are kept differs.
        full = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        grads = jax.grad(task.loss)(full, *task.take(task.train, chosen))
        updates, state = tx.update(grads, state, params)
        return (apply(params, updates, jax.random.fold_in(noise_key, number)), state), None

    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(STEPS)))((params, state))
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    train = task.loss(params, task.train["x"], task.train["y"])
    return float(train), float(task.evaluate(params, task.test)["test accuracy"])


def main() -> None:
    """Prints the table."""
    task = digits()
    print("| parameters | loss in training | test accuracy, % |\n| --- | ---: | ---: |")
    for way in ("nearest", "stochastic", "24 bits", "float32"):
        losses, accuracies = zip(*(run(task, seed, way) for seed in SEEDS))
        print(f"| {way} | {shown(summary(losses))} | {shown(summary(accuracies))} |", flush=True)


if __name__ == "__main__":
    main()
