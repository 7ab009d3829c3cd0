"""One of two processes that train together: `python -m tests.zo.worker RANK PORT FOLDER`.

`test_processes` runs the same steps in one process, and compares.
"""

import pathlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_lowbit import zo
from tests.zo.exact import OPT, exact_case, loss

PROCESSES, DEVICES_EACH, STEPS = 2, 2, 2


def placed(devices):
    """Parameters and a batch, spread over all devices."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    params, x = exact_case()

    def place(value, *spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)

    kernel, bias = place(params["kernel"], "a", "b"), place(params["bias"], "b")
    return {"kernel": kernel, "bias": bias}, place(x, "a")


def train(devices, path):
    """Parameters after some steps, which are logged."""
    params, x = placed(devices)
    state = OPT.init(params, 3)
    step = jax.jit(OPT.step, static_argnums=0)
    with zo.replay.Writer(path, OPT, params, state, digest_every=1) as log:
        for _ in range(STEPS):
            params, state, info = step(loss, params, state, x)
            log.append(params, state, info)
    return params


def main(rank, port, folder):
    """Trains as one of the processes; the first writes the result."""
    jax.config.update("jax_num_cpu_devices", DEVICES_EACH)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, rank)
    assert jax.device_count() == PROCESSES * DEVICES_EACH
    params = train(jax.devices(), folder / "log")
    result = multihost_utils.process_allgather(params, tiled=True)
    if rank == 0:
        np.savez(folder / "result.npz", **result)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))
