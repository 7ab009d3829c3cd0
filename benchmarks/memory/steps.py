"""The steps that are compiled: their names, settings and what the compiler says of them."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.memory import layerwise
from optax_lowbit.kernels.backends import KERNELS, Backend
from optax_lowbit.memory import MemoryPlan, abstract_params, abstract_state, plan
from optax_lowbit.memory.architectures import ARCHITECTURES
from optax_lowbit.memory.layout import fully_sharded
from optax_lowbit.memory.targets import platform_of
from optax_lowbit.memory.training import AXIS, OPTIMIZERS, plan_training

LAYERWISE = ", layer by layer"


def compiled(
    model: str,
    optimizer: str,
    target: str,
    *,
    dtype: str,
    devices: int,
    batch: int,
    remat: bool,
    backend: Backend = "auto",
) -> dict[str, Any]:
    """Bytes of a step on one device, and of its parts, with its settings.

    An optimizer's name may end in `LAYERWISE`.
    """
    settings = dict(
        model=model, optimizer=optimizer, target=target, dtype=dtype, devices=devices, batch=batch,
        remat=remat, length=512,
        backend=backend,
    )  # fmt: skip
    started = time.perf_counter()
    if optimizer.endswith(LAYERWISE):
        found = _layerwise(model, optimizer.removesuffix(LAYERWISE), target, dtype, devices, batch)
    else:
        found = plan_training(
            ARCHITECTURES[model], optimizer,
            dtype=dtype, devices=devices, batch=batch, remat=remat, target=target,
            backend=backend,
        )  # fmt: skip
    step = found.step
    assert step is not None
    return {
        **settings,
        "parameters": found.count,
        "state": found.state.total,
        "arguments": step.arguments,
        "outputs": step.outputs,
        "aliased": step.aliased,
        "temporaries": step.temporaries,
        "program": step.program,
        "device": step.nbytes,
        "all devices": step.nbytes * devices,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _layerwise(
    model: str, optimizer: str, target: str, dtype: str, devices: int, batch: int
) -> MemoryPlan:
    a = ARCHITECTURES[model]
    backend: Any = KERNELS[platform_of(target)]
    tx = OPTIMIZERS[optimizer](backend)
    params = fully_sharded(abstract_params(a, dtype), devices, AXIS)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    data_axis = AXIS if batch % devices == 0 else None
    tokens = jax.ShapeDtypeStruct(
        (batch, 512), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(data_axis))
    )
    # Its update is the step: this one only tells how the state begins.
    update_fn = optax.identity().update
    initial = optax.GradientTransformation(functools.partial(layerwise.init, tx), update_fn)
    state = abstract_state(initial, params)

    def step(params, state, tokens):
        return layerwise.step(a, tx, params, state, tokens, data_axis)

    specs = jax.tree.map(
        lambda leaf: PartitionSpec() if leaf.sharding is None else leaf.sharding.spec,
        (params, state),
    )
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*specs, PartitionSpec()))
    return plan(params, initial, step=jitted, arguments=(params, state, tokens), target=target)
