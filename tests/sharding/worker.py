"""One of several processes that train together: `python -m tests.sharding.worker RANK PORT OUT`.

`test_steps` runs the same steps in one process, and compares.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_lowbit

PROCESSES, DEVICES_EACH = 2, 2


def loss_fn(params, x):
    hidden = jnp.tanh(x @ params["in"] + params["bias"][None, :])
    return jnp.mean((hidden @ params["out"] - x) ** 2)


def train(devices, steps=2):
    """Parameters and state after some steps, all sharded over all devices."""
    mesh = jax.make_mesh(
        (2, 2), ("data", "inner"), axis_types=(AxisType.Auto,) * 2, devices=devices
    )
    both = NamedSharding(mesh, P(("data", "inner")))
    rng = np.random.default_rng(0)
    shapes = {"bias": (256,), "in": (128, 256), "out": (256, 128)}
    params = {
        name: jax.make_array_from_callback(shape, both, value.__getitem__)
        for name, shape in shapes.items()
        for value in [rng.normal(size=shape, scale=0.1).astype(np.float32)]
    }
    # Two parts, whose sum has the same bits whichever is first.
    x = rng.normal(size=(16, 128)).astype(np.float32)
    x = jax.make_array_from_callback(x.shape, NamedSharding(mesh, P("data")), x.__getitem__)

    tx = optax_lowbit.adamw4bit(1e-2)
    shardings = optax_lowbit.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(loss_fn)(params, x)
        grads = jax.lax.with_sharding_constraint(grads, jax.tree.map(lambda _: both, grads))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state, x)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings)):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (leaf.sharding, sharding)
    codes = state[0].mu["in"].codes
    assert {shard.data.shape for shard in codes.addressable_shards} == {(32, 128)}
    return params, state


def main(rank, port, out):
    """Trains as one of the processes; the first writes the result."""
    jax.config.update("jax_num_cpu_devices", DEVICES_EACH)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, rank)
    assert jax.device_count() == PROCESSES * DEVICES_EACH
    result = multihost_utils.process_allgather(train(jax.devices()), tiled=True)
    if rank == 0:
        np.savez(out, *jax.tree.leaves(result))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
