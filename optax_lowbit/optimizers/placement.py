"""Where the arrays of a state lie: on the devices of their parameters, in the same way."""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from optax_lowbit.kernels.meshes import mesh_axes
from optax_lowbit.quant import QuantSpec, double_quant


def check_alignment(path: str, param: jax.Array, spec: QuantSpec) -> None:
    """Raises ValueError if shards do not hold whole groups of codes, and of coded scales.

    On an Explicit mesh no array is moved unasked, so it could only fail later.
    """
    sharding = jax.typeof(param).sharding
    groups = {-1: spec.group_size}
    if spec.double_quant:
        groups = {-1: spec.block_size * double_quant.GROUP} if param.ndim == 1 else groups
        groups[-2] = double_quant.GROUP
    for axis, group in groups.items():
        if param.ndim < -axis:
            continue
        entry, size = sharding.spec[axis], param.shape[axis]
        parts = math.prod(sharding.mesh.shape[name] for name in mesh_axes(entry))
        if parts > 1 and size % (parts * group):
            raise ValueError(
                f"the {'last axis' if axis == -1 else 'last but one axis'} of parameter {path!r}, "
                f"of {size} elements, is sharded {parts} ways over {entry!r}, so it must be a "
                f"multiple of {parts} x {group} for its state to be kept in groups of {group}; "
                "shard another axis, or give this parameter a smaller block_size or None in "
                "policy.rules"
            )


def zeros_placed_like(param: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros of the leaf's shape and dtype, on the devices of a concrete parameter."""
    return jnp.zeros(leaf.shape, leaf.dtype, device=placement_like(param, leaf.shape))


def placement_like(param: Any, shape: tuple[int, ...]) -> jax.sharding.Sharding | None:
    """Where an array of the shape lies beside a concrete parameter; None where JAX puts it."""
    sharding = None
    if not isinstance(param, jax.core.Tracer):
        sharding = getattr(param, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(
            sharding.mesh,
            divisible_spec(sharding, shape),
            memory_kind=sharding.memory_kind,
        )
    # Left to JAX where it is one device: naming it would commit the array, which an update does
    # not, and the second update would compile again.
    on_default = sharding is None or sharding.device_set == {jax.local_devices()[0]}
    return None if on_default else sharding


def divisible_spec(
    sharding: jax.sharding.NamedSharding, shape: tuple[int, ...]
) -> jax.sharding.PartitionSpec:
    """The parameter's spec, without the mesh axes that do not divide ``shape``."""
    entries = []
    for size, entry in zip(shape, sharding.spec):
        parts = math.prod(sharding.mesh.shape[name] for name in mesh_axes(entry))
        entries.append(entry if size % parts == 0 else None)
    return jax.sharding.PartitionSpec(*entries)
