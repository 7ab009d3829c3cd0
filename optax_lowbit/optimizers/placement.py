"""Where the arrays of a state lie: on the devices of their parameters, in the same way."""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from optax_lowbit.kernels.meshes import mesh_axes


def check_alignment(path: str, param: jax.Array, group: int) -> None:
    """Raises ValueError if shards of the last axis do not hold whole groups of codes.

    On an Explicit mesh no array is moved unasked, so it could only fail later.
    """
    sharding = jax.typeof(param).sharding
    entry = sharding.spec[-1] if param.ndim else None
    parts = math.prod(sharding.mesh.shape[name] for name in mesh_axes(entry))
    if parts > 1 and param.shape[-1] % (parts * group):
        raise ValueError(
            f"the last axis of parameter {path!r}, of {param.shape[-1]} elements, is sharded "
            f"{parts} ways over {entry!r}, so it must be a multiple of {parts} x "
            f"{group} for its state to be kept in groups of {group}; shard "
            "another axis, or give this parameter a smaller block_size or None in policy.rules"
        )


def zeros_placed_like(param: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros of the leaf's shape and dtype, on the devices of a concrete parameter."""
    sharding = None
    if not isinstance(param, jax.core.Tracer):
        sharding = getattr(param, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(
            sharding.mesh,
            divisible_spec(sharding, leaf.shape),
            memory_kind=sharding.memory_kind,
        )
        return jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
    # Left to JAX where it is one device: naming it would commit the array, which an update does
    # not, and the second update would compile again.
    on_default = sharding is None or sharding.device_set == {jax.local_devices()[0]}
    return jnp.zeros(leaf.shape, leaf.dtype, device=None if on_default else sharding)


def divisible_spec(
    sharding: jax.sharding.NamedSharding, shape: tuple[int, ...]
) -> jax.sharding.PartitionSpec:
    """The parameter's spec, without the mesh axes that do not divide ``shape``."""
    entries = []
    for size, entry in zip(shape, sharding.spec):
        parts = math.prod(sharding.mesh.shape[name] for name in mesh_axes(entry))
        entries.append(entry if size % parts == 0 else None)
    return jax.sharding.PartitionSpec(*entries)
