"""Compiles offloaded optimizers for a TPU and prints a JSON report: a program, no test."""

import json
import re

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import optax_lowbit

SHAPE, MIN_SIZE = (2048, 2048), 4096


def all_at_once(tx):
    """What offload is compared with: copies, in whatever order XLA likes."""

    def moved(state, space):
        return jax.tree.map(lambda x: jax.device_put(x, space) if x.size > MIN_SIZE else x, state)

    def update(grads, state, params):
        updates, state = tx.update(grads, moved(state, jax.memory.Space.Device), params)
        return updates, moved(state, jax.memory.Space.Host)

    return optax.GradientTransformation(tx.init, update)


ADAMW, ADAMW4BIT = optax.adamw(1e-3), optax_lowbit.adamw4bit(1e-3, backend="pallas_tpu")
CASES = {
    "adamw, 12 leaves": (optax_lowbit.offload(ADAMW, min_size=MIN_SIZE), 12),
    "adamw, 24 leaves": (optax_lowbit.offload(ADAMW, min_size=MIN_SIZE), 24),
    "adamw4bit, 12 leaves": (optax_lowbit.offload(ADAMW4BIT, min_size=MIN_SIZE), 12),
    "adamw4bit, 24 leaves": (optax_lowbit.offload(ADAMW4BIT, min_size=MIN_SIZE), 24),
    "all at once": (all_at_once(ADAMW), 12),
}


def compiled(tx, leaves, device):
    host = device.with_memory_kind("pinned_host")
    params = {
        f"leaf {i:02}": jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=device)
        for i in range(leaves)
    }
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=host if x.size > MIN_SIZE else device
        ),
        jax.eval_shape(tx.init, params),
    )
    paged = [x for x in jax.tree.leaves(state) if x.size > MIN_SIZE]

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    program = jax.jit(step, donate_argnums=(0, 1, 2)).lower(params, state, params).compile()
    memory = program.memory_analysis()
    return {
        "leaves": leaves,
        "parameter": 4 * SHAPE[0] * SHAPE[1],
        "state of a leaf": sum(x.size * x.dtype.itemsize for x in paged) // leaves,
        "paged arrays": len(paged),
        "paged codes": sum(x.dtype == jnp.uint8 for x in paged),
        "transfers": len(re.findall(r"= \([^=]*S\(5\)[^=]* copy-start\(", program.as_text())),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes,
        "host arguments": memory.host_argument_size_in_bytes,
        "host aliased": memory.host_alias_size_in_bytes,
        "host temporaries": memory.host_temp_size_in_bytes,
    }


def main():
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    sharding = SingleDeviceSharding(device)
    print(json.dumps({name: compiled(*case, sharding) for name, case in CASES.items()}))


if __name__ == "__main__":
    main()
