"""What probing does to parameters: perturbed in place and put back, and perturbed where used.

MeZO as published, and its ports, add ``eps z`` to the parameters, take ``2 eps z`` away and add
``eps z`` again, every sum rounded to the parameters' dtype; updates are rounded to nearest.
``python -m benchmarks.zo_drift`` prints the tables of docs/zeroth_order_low_bit.md: how far
parameters are from where they were, and how many a small step moves. In place with the arithmetic
of JAX, of ports of MeZO to it, and with that of PyTorch, of MeZO and most others, where it is
installed.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit import zo

SHAPE = (512, 512)
DEVIATION = 0.02
CYCLES = 1000
STEPS = (1e-4, 1e-5, 1e-6)
HAS_TORCH = importlib.util.find_spec("torch") is not None


def main():
    """Prints the tables."""
    print(
        "| dtype | eps | in place, 1 cycle: changed | 1000 cycles, JAX | PyTorch | here |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |"
    )
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        for eps in (1e-3, 1e-4):
            old = weights(dtype)
            once = np.mean(changed(old, in_place(old, eps, 1)))
            torch_drift = drift(old, in_place_torch(old, eps, CYCLES)) if HAS_TORCH else np.nan
            print(
                f"| {jnp.dtype(dtype).name} | {eps:g} | {once:.0%} "
                f"| {drift(old, in_place(old, eps, CYCLES)):.2g} | {torch_drift:.2g} "
                f"| {drift(old, probed(weights(dtype), eps, CYCLES)):.2g} |"
            )
    print(
        "\n| step of bfloat16 weights | moved, PyTorch | of the step taken | moved, here "
        "| of the step taken |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for size in STEPS:
        theirs = movement(*stepped_torch(size)) if HAS_TORCH else (np.nan, np.nan)
        cells = " | ".join(f"{x:.1%} | {y:.2f}" for x, y in (theirs, movement(*stepped(size))))
        print(f"| {size:g} | {cells} |")


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


def in_place_torch(params, eps, cycles):
    """The same by PyTorch: ``p += scale * z * eps`` from left to right, as in MeZO's programs."""
    import torch  # pyright: ignore[reportMissingImports]

    p = as_torch(params)
    for i in range(cycles):
        z = torch.normal(0, 1, SHAPE, dtype=p.dtype, generator=torch.Generator().manual_seed(i))
        for scale in (1, -2, 1):
            p = p + scale * z * eps
    return p.float().numpy()


def stepped_torch(size):
    """bfloat16 weights before and after ``p -= lr * (g * z)`` by PyTorch, and ``lr g z``."""
    import torch  # pyright: ignore[reportMissingImports]

    p = as_torch(weights(jnp.bfloat16))
    z = torch.normal(0, 1, SHAPE, dtype=p.dtype, generator=torch.Generator().manual_seed(0))
    step = size * (1.0 * z)
    return p.float().numpy(), (p - step).float().numpy(), -size * z.float().numpy()


def stepped(size):
    """The same by this library."""
    opt, old = zo.zo_sgd(size, noise=zo.Gaussian()), weights(jnp.bfloat16)
    state, slope = opt.init(old, 0), jnp.ones(1)
    record = opt.rule.record(slope, jnp.float32(size), jnp.float32(0))
    new, _ = jax.jit(opt.apply)(old, state, record)
    return old, new, -size * opt.combine(old.astype(jnp.float32), state, slope)


def as_torch(params):
    """The same values as a tensor of the same dtype."""
    import torch  # pyright: ignore[reportMissingImports]

    dtype = getattr(torch, jnp.dtype(params.dtype).name)
    return torch.from_numpy(np.array(params, np.float32)).to(dtype)


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


def movement(old, new, wanted):
    """The share of weights that moved, and how far all went along a step, over its length."""
    old, new, wanted = (np.asarray(x, np.float64) for x in (old, new, wanted))
    return np.mean(changed(old, new)), np.vdot(new - old, wanted) / np.vdot(wanted, wanted)


def changed(old, new):
    """Which weights are not what they were."""
    return np.asarray(old) != np.asarray(new)


if __name__ == "__main__":
    main()
