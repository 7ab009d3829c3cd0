"""Where the arrays of a state lie: on the devices of their parameters, in the same way."""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from optax_lowbit.kernels.meshes import mesh_axes
from optax_lowbit.quant import QuantSpec, double_quant


def misalignment(
    path: str, shape: tuple[int, ...], sharding: jax.sharding.NamedSharding, spec: QuantSpec
) -> str:
    """What is wrong where shards do not hold whole groups of codes, or of scales; or empty."""
    entries = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    for axis, group in _groups(spec, len(shape)).items():
        entry, size = entries[axis], shape[axis]
        parts = math.prod(sharding.mesh.shape[name] for name in mesh_axes(entry))
        if parts > 1 and size % (parts * group):
            return (
                f"the {'last' if axis == -1 else 'last but one'} axis of parameter {path!r}, of "
                f"{size} elements, is sharded {parts} ways over {entry!r}, so it must be a "
                f"multiple of {parts} x {group} for its state to be kept in groups of {group}; "
                "shard another axis, or give this parameter a smaller block_size or None in "
                "policy.rules"
            )
    return ""


def _groups(spec: QuantSpec, ndim: int) -> dict[int, int]:
    """Along which axes, and in which numbers, elements are kept together."""
    if not spec.double_quant:
        return {-1: spec.group_size} if ndim else {}
    if ndim == 1:
        return {-1: spec.block_size * double_quant.GROUP}
    return {-1: spec.group_size, -2: double_quant.GROUP} if ndim else {}


def check_alignment(path: str, param: jax.Array, spec: QuantSpec) -> None:
    """Raises ValueError if shards do not hold whole groups of codes, or of scales.

    On an Explicit mesh no array is moved unasked, so it could only fail later.
    """
    message = misalignment(path, param.shape, jax.typeof(param).sharding, spec)
    if message:
        raise ValueError(message)


def zeros_placed_like(param: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros of the leaf's shape and dtype, on the devices of a concrete parameter."""
    return jnp.zeros(leaf.shape, leaf.dtype, device=placement_like(param, leaf.shape))


def placement_like(param: Any, shape: tuple[int, ...]) -> jax.sharding.Sharding | None:
    """Where an array of the shape lies beside a concrete parameter; None where JAX puts it."""
    sharding = None
    if not isinstance(param, jax.core.Tracer):
        sharding = getattr(param, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
        return divisible(sharding, shape)
    # Left to JAX where it is one device: naming it would commit the array, which an update does
    # not, and the second update would compile again.
    on_default = sharding is None or sharding.device_set == {jax.local_devices()[0]}
    return None if on_default else sharding


def divisible(
    sharding: jax.sharding.NamedSharding, shape: tuple[int, ...]
) -> jax.sharding.NamedSharding:
    """The sharding, without the mesh axes that do not divide ``shape``."""
    entries = []
    for size, entry in zip(shape, sharding.spec):
        parts = math.prod(sharding.mesh.shape[name] for name in mesh_axes(entry))
        entries.append(entry if size % parts == 0 else None)
    while entries and entries[-1] is None:  # as the results of a compiled update have it
        entries.pop()
    spec = jax.sharding.PartitionSpec(*entries)
    return jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
