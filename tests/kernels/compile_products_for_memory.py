"""Temporaries of a step on adapters of frozen 4-bit matrices, as a TPU's compiler counts them.

A program, no test: prints JSON, bytes of each model with each kind of product. Arguments: a
topology such as `v5e:2x2`; layers, their width, and the batch; and which models, else all of them.

A v5e has 128 MiB of fast memory, of which nothing is counted. XLA keeps activations there where it
can, beside its own products more of them than beside a kernel: at a small batch that hides the
difference between products, or turns it round.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import optax_lowbit
from optax_lowbit.kernels.quantized_dot import quantized_dot
from optax_lowbit.kernels.quantized_matrix import abstract_matrix

RANK = 16


def naive(x, w):
    return x @ optax_lowbit.dequantize(w.rows).mT


def ours(backend, x, w):
    return quantized_dot(x, w.rows, w.shape, backend=backend)


PRODUCTS = {
    "plain LoRA": jnp.matmul,
    "naive": naive,
    "by XLA": functools.partial(ours, "reference"),
    "by kernels": functools.partial(ours, "pallas_tpu"),
}


def layer(product, x, operands):
    w, a, b = operands
    return jnp.tanh(product(x, w) + (x @ a) @ b)


def unrolled(product, adapters, matrices, x):
    for w, a, b in zip(matrices, *adapters, strict=True):
        x = layer(product, x, (w, a, b))
    return jnp.mean(x.astype(jnp.float32) ** 2)


def scanned(product, adapters, matrices, x, checkpoint=lambda body: body):
    body = checkpoint(lambda x, operands: (layer(product, x, operands), None))
    x, _ = jax.lax.scan(body, x, (matrices, *adapters))
    return jnp.mean(x.astype(jnp.float32) ** 2)


MODELS = {
    "unrolled": unrolled,
    "scanned": scanned,
    "scanned, checkpointed": functools.partial(scanned, checkpoint=jax.checkpoint),
}


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def operands(model, kind, layers, width, batch):
    if kind == "plain LoRA":
        matrix = floats(width, width)
    else:
        matrix = abstract_matrix((width, width), jnp.bfloat16)
    down, up = floats(width, RANK), floats(RANK, width)
    if model == "unrolled":
        return ([down] * layers, [up] * layers), [matrix] * layers, floats(batch, width)
    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((layers, *x.shape), x.dtype), ((down, up), matrix)
    )
    return *stacked, floats(batch, width)


def temporaries(model, kind, sizes, sharding):
    loss = functools.partial(MODELS[model], PRODUCTS[kind])
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        operands(model, kind, *sizes),
    )
    program = jax.jit(jax.grad(loss)).lower(*arguments).compile()
    return program.memory_analysis().temp_size_in_bytes


def report(topology, sizes, models):
    """For each model and product: bytes."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = SingleDeviceSharding(device)
    return {
        model: {kind: temporaries(model, kind, sizes, sharding) for kind in PRODUCTS}
        for model in models
    }


def main():
    topology, layers, width, batch, *models = sys.argv[1:]
    sizes = int(layers), int(width), int(batch)
    print(json.dumps(report(topology, sizes, models or list(MODELS))))


if __name__ == "__main__":
    main()
