"""Temporaries of zeroth-order steps as a compiler counts them, printed as JSON: a program, no test.

Arguments: a TPU topology such as `v5e:2x2`, or `cpu`.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from optax_lowbit import zo

BATCH = 64
# Layers and their width. Small matrices are kept in a TPU's fast memory, whoever uses them.
SIZES = {"cpu": (24, 512), "tpu": (12, 2048)}


def layer(x, weight):
    return jnp.tanh(x @ weight) + x


def unrolled(params, x):
    for weight in params:
        x = layer(x, weight)
    return jnp.mean(x**2)


def scanned(params, x):
    x, _ = jax.lax.scan(lambda x, weight: (layer(x, weight), None), x, params)
    return jnp.mean(x**2)


OPTIMIZERS = {
    "central": zo.zo_sgd(1e-6),
    "one-sided": zo.zo_sgd(1e-6, estimator=zo.OneSided()),
    "four probes": zo.zo_sgd(1e-6, num_probes=4),
    "momentum in 4 bits": zo.zo_sgd_momentum(1e-6),
    "hizoo": zo.hizoo(1e-6, curvature="difference"),
    "random mask": zo.zo_sgd(1e-6, noise=zo.RandomMask(zo.Rademacher(), 0.5, 1)),
    "magnitude mask": zo.zo_sgd(1e-6, noise=zo.MagnitudeMask(zo.Rademacher(), 0.75, 100, "global")),
    "forward gradient": zo.forward_grad(1e-6),
}


def naive(loss, params, key, x):
    """A tree of directions, perturbed parameters, and an update, left to the compiler."""
    keys = jax.random.split(key, len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    z = jax.tree.map(lambda w, k: jax.random.rademacher(k, w.shape, w.dtype), params, keys)
    up, down = (
        loss(jax.tree.map(lambda w, z, s=s: w + jnp.float32(s) * z, params, z), x)
        for s in (1e-3, -1e-3)
    )
    slope = (up - down) / 2e-3
    return jax.tree.map(lambda w, z: w - 1e-6 * slope * z, params, z)


def temporaries(function, *arguments, donated=(), sharding=None):
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    program = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
    return program.memory_analysis().temp_size_in_bytes


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def report(names, platform="cpu", sharding=None):
    """For each model and optimizer: bytes beside those of the loss, as a share of parameters."""
    shares, (layers, width) = {}, SIZES[platform]
    x = floats(BATCH, width)
    models = {
        "unrolled": (unrolled, [floats(width, width)] * layers),
        "scanned": (scanned, floats(layers, width, width)),
    }
    for model, (loss, params) in models.items():
        size = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
        plain = temporaries(loss, params, x, sharding=sharding)

        def share(function, *arguments, plain=plain, size=size, **options):
            bytes_ = temporaries(function, *arguments, sharding=sharding, **options)
            return (bytes_ - plain) / size

        for name in names:
            opt = OPTIMIZERS[name]
            state = jax.eval_shape(lambda p, opt=opt: opt.init(p, 0), params)
            shares[f"{model}, {name}"] = share(
                lambda p, s, x, opt=opt, loss=loss: opt.step(loss, p, s, x),
                params, state, x, donated=(0, 1),
            )  # fmt: skip
        key = jax.eval_shape(lambda: jax.random.key(0))
        shares[f"{model}, perturbed tree"] = share(
            lambda p, key, x, loss=loss: naive(loss, p, key, x), params, key, x, donated=(0,)
        )
    return shares


def main():
    names, platform, sharding = list(OPTIMIZERS), "cpu", None
    if sys.argv[1] != "cpu":
        # Kernels are chosen by the platforms of this process, which has no TPU.
        names.remove("momentum in 4 bits")
        device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]
        platform, sharding = "tpu", SingleDeviceSharding(device)
    print(json.dumps(report(names, platform, sharding)))


if __name__ == "__main__":
    main()
