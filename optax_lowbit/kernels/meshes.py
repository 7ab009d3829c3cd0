"""How an array is spread over devices, as far as its type and the mesh tell."""

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.core


def is_explicit(param: Any) -> bool:
    """Whether the sharding is part of the array's type."""
    mesh = jax.typeof(param).sharding.mesh if isinstance(param, jax.Array) else None
    return mesh is not None and not mesh.empty and bool(mesh.explicit_axes)


def is_shard(x: Any) -> bool:
    """Whether the array is one device's: inside `jax.shard_map`, or of a process with one."""
    mesh = jax.typeof(x).sharding.mesh if isinstance(x, jax.Array) else None
    is_manual = mesh is not None and not mesh.empty and bool(mesh.manual_axes)
    return is_manual or most_shards() == 1


def are_on_one_device(arrays: Iterable[Any]) -> bool:
    """Whether these are known to be: concrete, and with no mesh in the context.

    Of what is traced it is not known, whatever the types: `jax.jit` is given shardings of its own.
    """
    return jax.sharding.get_abstract_mesh().empty and not any(
        isinstance(x, jax.core.Tracer)
        or (isinstance(x, jax.Array) and len(x.sharding.device_set) > 1)
        for x in arrays
    )


def axis_shards(x: jax.Array) -> tuple[int, ...]:
    """Devices that each axis may be spread over: known from the type, or all there are."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.explicit_axes and not sharding.mesh.auto_axes:
        return tuple(
            math.prod(sharding.mesh.shape[name] for name in mesh_axes(entry))
            for entry in sharding.spec
        )
    return (most_shards(),) * x.ndim


def most_shards() -> int:
    """Devices that any axis may be spread over, whatever the mesh makes of them."""
    return max(jax.device_count(), jax.sharding.get_abstract_mesh().size)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a partition spec."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes that ``x`` differs along in `jax.shard_map`; none under check_vma=False."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def as_varying(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """``x`` with the type of what differs along these mesh axes inside `jax.shard_map`."""
    missing = tuple(sorted(set(axes) - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def axes_to_exchange(leaf: jax.Array, statistic: jax.Array) -> tuple[str, ...]:
    """The mesh axes that a leaf is spread over inside `jax.shard_map` and a statistic of it is not.

    The leaf's maxima or means along an array axis are one for all devices along these, so they must
    be exchanged. Known from the types of the old state; none under check_vma=False.
    """
    return tuple(sorted(varying_axes(leaf) - varying_axes(statistic)))


def on_own_mesh(value: Any) -> contextlib.AbstractContextManager[Any]:
    """The context in which to compute with an array: its mesh, whatever the user's context is."""
    arrays = [x for x in jax.tree.leaves(value) if isinstance(x, jax.Array)]
    sharding = arrays[0].sharding if arrays else None
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return contextlib.nullcontext()
    mesh = sharding.mesh
    return jax.set_mesh(mesh) if isinstance(mesh, jax.sharding.Mesh) else contextlib.nullcontext()
