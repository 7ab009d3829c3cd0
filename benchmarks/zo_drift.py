"""What probing does to parameters: perturbed in place and put back, and perturbed where used.

MeZO as published, and its ports, add ``eps z`` to the parameters, take ``2 eps z`` away and add
``eps z`` again, every sum rounded to the parameters' dtype. ``python -m benchmarks.zo_drift``
prints the table of docs/zeroth_order.md: how far parameters are from where they were.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit import zo

SHAPE = (512, 512)
DEVIATION = 0.02
CYCLES = 1000


def main():
    """Prints the table."""
    print("| dtype | eps | in place, 1 cycle | in place, 1000 cycles | here, 1000 cycles |")
    print("| --- | --- | ---: | ---: | ---: |")
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        for eps in (1e-3, 1e-4):
            old = weights(dtype)
            moved = float(np.mean(changed(old, in_place(old, eps, 1))))
            theirs = drift(old, in_place(old, eps, CYCLES))
            ours = drift(weights(dtype), probed(weights(dtype), eps, CYCLES))
            print(
                f"| {jnp.dtype(dtype).name} | {eps:g} | {moved:.0%} of weights changed "
                f"| {theirs:.2g} | {ours:.2g} |"
            )


def weights(dtype):
    """Normal weights, as of a layer."""
    return (jax.random.normal(jax.random.key(0), SHAPE) * DEVIATION).astype(dtype)


@functools.partial(jax.jit, static_argnames=("eps",))
def in_place(params, eps, cycles):
    """Parameters after being perturbed and put back, with Gaussian directions in their dtype."""
    finfo = jnp.finfo(params.dtype)

    def plus(x, y):
        # Without it XLA may keep the float32 in which a CPU adds.
        return jax.lax.reduce_precision(x + y, finfo.nexp, finfo.nmant)

    def cycle(i, params):
        z = jax.random.normal(jax.random.fold_in(jax.random.key(1), i), SHAPE, params.dtype)
        for scale in (1, -2, 1):
            params = plus(params, plus(z * jnp.asarray(scale * eps, params.dtype), 0))
        return params

    return jax.lax.fori_loop(0, cycles, cycle, params)


def probed(params, eps, cycles):
    """Parameters after their loss was estimated so often, by the same two evaluations each."""
    opt = zo.zo_sgd(1e-6, eps=eps, noise=zo.Gaussian())
    state = opt.init(params, 0)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(params, state):
        def cycle(i, total):
            return total + opt.estimate(mean_square, params, state._replace(count=i)).loss

        return params, jax.lax.fori_loop(0, cycles, cycle, jnp.float32(0))

    return run(params, state)[0]


def mean_square(params):
    """Any loss."""
    return jnp.mean(params.astype(jnp.float32) ** 2)


def drift(old, new):
    """The distance, over the norm."""
    old, new = (np.asarray(x, np.float64) for x in (old, new))
    return float(np.linalg.norm(new - old) / np.linalg.norm(old))


def changed(old, new):
    """Which weights are not what they were."""
    return np.asarray(old) != np.asarray(new)


if __name__ == "__main__":
    main()
