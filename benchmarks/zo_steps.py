"""What a zeroth-order step takes beside the forward passes that it is made of.

``python -m benchmarks.zo_steps`` prints the table of docs/zeroth_order.md: the time of a step of
``zo_sgd``, and of two evaluations of its loss, of a decoder with the shapes of SmolLM2-135M, in
turns in one process.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from examples.llm.models.building import abstract_model, build_model
from examples.llm.models.config import DecoderConfig
from examples.llm.training.steps import next_token_loss
from optax_lowbit import zo

SMOLLM2 = DecoderConfig(
    vocabulary_size=49152, hidden_size=576, feed_forward_size=1536, num_layers=30, num_heads=9,
    num_key_value_heads=3, head_size=64, context_length=8192, rotary_base=1e5,
    norm_epsilon=1e-5, tied_embeddings=True,
)  # fmt: skip
TOKENS = (256, 1024)
TURNS = 9


def main():
    """Prints the table."""
    print("| tokens | two forward passes, s | a step, s | ratio of the medians | least, most |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for tokens in TOKENS:
        forward, step = seconds(tokens)
        ratios = [b / a for a, b in zip(forward, step, strict=True)]
        ratio = statistics.median(step) / statistics.median(forward)
        print(
            f"| {tokens} | {statistics.median(forward):.2f} | {statistics.median(step):.2f} "
            f"| {ratio:.2f} | {min(ratios):.2f}, {max(ratios):.2f} |"
        )


def seconds(tokens):
    """Wall times of two evaluations of the loss, and of a step, in turns."""
    graph, shapes = abstract_model(SMOLLM2)
    key = jax.random.key(0)
    params = jax.tree.map(lambda s: 0.02 * jax.random.normal(key, s.shape, s.dtype), shapes)
    # One window has one token more than it has predictions.
    windows = jnp.zeros((1, tokens + 1), jnp.int32)
    opt = zo.zo_sgd(1e-6)

    def loss_fn(params, windows):
        return next_token_loss(build_model(graph, params), windows)

    evaluate = jax.jit(loss_fn)
    step = jax.jit(lambda p, s, x: opt.step(loss_fn, p, s, x), donate_argnums=(0, 1))
    state = opt.init(params, 0)
    evaluate(params, windows).block_until_ready()
    params, state, _ = jax.block_until_ready(step(params, state, windows))
    forwards, steps = [], []
    for _ in range(TURNS):
        start = time.perf_counter()
        for _ in range(2):
            evaluate(params, windows).block_until_ready()
        middle = time.perf_counter()
        params, state, _ = jax.block_until_ready(step(params, state, windows))
        forwards.append(middle - start)
        steps.append(time.perf_counter() - middle)
    return forwards, steps


if __name__ == "__main__":
    main()
