"""What directions cost: an update of a leaf along one, beside adding a number to it.

``python -m benchmarks.zo_noise`` prints the table of docs/zeroth_order.md: nanoseconds an element
of a 4096x4096 float32 leaf, in turns in one process, each written over its argument.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from optax_lowbit import zo

SHAPE = (4096, 4096)
TURNS = 15


def main():
    """Prints the table."""
    params = {"w": jnp.zeros(SHAPE)}
    programs = {
        "`x + 1`": jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    }
    for noise in (zo.Rademacher(), zo.Gaussian()):
        programs[f"`{type(noise).__name__}`"] = update(noise, params)
    programs["`jax.random.normal`"] = jax.jit(
        lambda x: {"w": x["w"] + 1e-3 * jax.random.normal(jax.random.key(0), SHAPE)},
        donate_argnums=0,
    )
    print("| | minimum | median |")
    print("| --- | ---: | ---: |")
    for name, times in nanoseconds(programs, params).items():
        print(f"| {name} | {min(times):.2f} | {statistics.median(times):.2f} |")


def update(noise, params):
    """The update of a step, by a record that is given."""
    opt = zo.zo_sgd(1e-3, noise=noise)
    state = opt.init(params, 0)
    record = jnp.array([1e-3, 0.0])
    return jax.jit(lambda params: opt.apply(params, state, record)[0], donate_argnums=0)


def nanoseconds(programs, params):
    """Of each program, in turns."""
    times = {name: [] for name in programs}
    for program in programs.values():
        params = jax.block_until_ready(program(params))
    for _ in range(TURNS):
        for name, program in programs.items():
            start = time.perf_counter()
            params = jax.block_until_ready(program(params))
            seconds = time.perf_counter() - start
            times[name].append(1e9 * seconds / (SHAPE[0] * SHAPE[1]))
    return times


if __name__ == "__main__":
    main()
