"""The memory of fine-tuning a whole model: its parameters, an optimizer and a compiled step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from optax_lowbit.kernels.backends import KERNELS, Backend
from optax_lowbit.memory.architectures import Architecture, abstract_params
from optax_lowbit.memory.layout import abstract_state, fully_sharded
from optax_lowbit.memory.planner import MemoryPlan, plan
from optax_lowbit.memory.targets import platform_of
from optax_lowbit.memory.transformer import train_step
from optax_lowbit.optimizers import (
    adagrad8bit,
    adamw4bit,
    adamw8bit,
    ademamix4bit,
    factor4bit,
    lion4bit,
    lion8bit,
    rmsprop8bit,
    sgd4bit,
    sgd8bit,
)

Factory = Callable[[Backend], optax.GradientTransformation]

AXIS = "data"


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """``tx`` with its state and its arithmetic in float32, whatever the parameters' dtype."""

    def cast(tree):
        return optax.tree.cast(tree, jnp.float32)

    def update_fn(updates, state, params=None):
        return tx.update(cast(updates), state, cast(params))

    return optax.GradientTransformation(lambda params: tx.init(cast(params)), update_fn)


# Their rates make no difference to memory.
OPTIMIZERS: Mapping[str, Factory] = {
    "adamw": lambda backend: optax.adamw(1e-4),
    "adamw-float32": lambda backend: in_float32(optax.adamw(1e-4)),
    "adafactor": lambda backend: optax.adafactor(1e-4),
    "sgd": lambda backend: optax.sgd(1e-4, momentum=0.9),
    "adamw8bit": lambda backend: adamw8bit(1e-4, backend=backend),
    "adamw4bit": lambda backend: adamw4bit(1e-4, backend=backend),
    "factor4bit": lambda backend: factor4bit(1e-4, backend=backend),
    "lion": lambda backend: optax.lion(1e-4),
    "lion8bit": lambda backend: lion8bit(1e-4),
    "lion4bit": lambda backend: lion4bit(1e-4),
    "ademamix4bit": lambda backend: ademamix4bit(1e-4),
    "rmsprop8bit": lambda backend: rmsprop8bit(1e-4),
    "adagrad8bit": lambda backend: adagrad8bit(1e-4),
    "sgd8bit": lambda backend: sgd8bit(1e-4, momentum=0.9, backend=backend),
    "sgd4bit": lambda backend: sgd4bit(1e-4, momentum=0.9, backend=backend),
}


def plan_training(
    model: Architecture,
    optimizer: str,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    devices: int = 1,
    batch: int | None = None,
    length: int = 512,
    remat: bool = True,
    target: str = "cpu",
    backend: Backend = "auto",
) -> MemoryPlan:
    """The plan of fine-tuning all parameters of a model.

    Args:
      model: The architecture.
      optimizer: A name of `OPTIMIZERS`.
      dtype: Of parameters, gradients and activations.
      devices: Devices over which parameters, gradients and state are split; so are examples, if it
        divides their number.
      batch: Examples in a step, of all devices together; None: no step is compiled.
      length: Tokens of an example.
      remat: As of :func:`train_step`.
      target: What the step is compiled for.
      backend: Of low-bit optimizers; ``"auto"``: the kernels of the target, for all leaves.
    """
    params = abstract_params(model, dtype)
    if devices > 1:
        params = fully_sharded(params, devices, AXIS)
    if batch is None:
        return plan(params, OPTIMIZERS[optimizer](backend), target=target)
    if backend == "auto":
        named: Any = KERNELS[platform_of(target)]  # which this process may not have
        backend = named
    tx = OPTIMIZERS[optimizer](backend)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    step, arguments = _step_and_arguments(model, tx, params, tokens, remat, target)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return plan(params, tx, step=step, arguments=arguments, target=target)


def _step_and_arguments(
    model: Architecture,
    tx: optax.GradientTransformation,
    params: Any,
    tokens: jax.ShapeDtypeStruct,
    remat: bool,
    target: str,
) -> tuple[Any, tuple[Any, Any, Any]]:
    """The jitted step, and its parameters, state and tokens, laid out over the parameters' mesh."""
    state = abstract_state(tx, params)
    sharding = jax.tree.leaves(params)[0].sharding
    if sharding is None:
        step = jax.jit(train_step(model, tx, remat=remat), donate_argnums=(0, 1))
        return step, (params, state, tokens)
    data_axis = AXIS if tokens.shape[0] % sharding.mesh.size == 0 else None
    tokens = tokens.update(sharding=NamedSharding(sharding.mesh, PartitionSpec(data_axis)))
    specs = jax.tree.map(_spec, (params, state))
    explicit = platform_of(target) == "tpu"
    step = jax.jit(
        train_step(model, tx, remat=remat, data_axis=data_axis, specs=specs, explicit=explicit),
        donate_argnums=(0, 1),
        out_shardings=(*specs, PartitionSpec()),
    )
    return step, (params, state, tokens)


def _spec(leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
    return PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
