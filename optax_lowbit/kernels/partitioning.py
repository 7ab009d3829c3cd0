"""Runs a kernel on each device's part of a leaf; compilers cannot part a kernel by themselves."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import NamedSharding, PartitionSpec

from optax_lowbit.kernels.meshes import (
    as_varying,
    is_explicit,
    is_shard,
    mesh_axes,
    varying_axes,
)

Kernel = Callable[..., tuple[jax.Array, ...]]


def per_device(
    kernel: Kernel,
    coefficients: jax.Array,
    arrays: Sequence[jax.Array],
    group: int,
    *,
    exchanges: bool = False,
) -> tuple[jax.Array, ...]:
    """``kernel(coefficients, *arrays)``, on parts of the arrays where they are spread out.

    Works in and out of `jax.vmap` (one example after the other), on Auto and Explicit meshes, and
    inside `jax.shard_map`.

    Args:
      kernel: Gives arrays laid out like the leaf.
      coefficients: A vector that all devices need.
      arrays: Laid out like the leaf, which is the first: of its rank, an axis as long as the
        leaf's, in proportion to it (codes, scales), or 1.
      group: Elements of the last axis that must stay together.
      exchanges: Whether devices must exchange what they find: the kernel is then also given
        ``spread``, the names of the mesh axes that each axis of the leaf is spread over.
    """

    def on_part(spec, *args):
        if not exchanges:
            return kernel(*args)
        return kernel(*args, spread=[mesh_axes(entry) for entry in spec])

    @jax.custom_batching.custom_vmap
    def run(coefficients, *arrays):
        leaf = arrays[0]
        if is_shard(leaf):
            # What a kernel gives has no type that tells along which axes of a shard_map it differs.
            axes = frozenset().union(*map(varying_axes, (coefficients, *arrays)))
            results = on_part([None] * leaf.ndim, coefficients, *arrays)
            return tuple(as_varying(x, axes) for x in results)
        if is_explicit(leaf):
            return _on_explicit_mesh(on_part, coefficients, arrays)
        return _on_auto_mesh(on_part, coefficients, arrays, group)

    @run.def_vmap
    def _(axis_size, in_batched, *args):
        args = [
            arg if batched else jax.numpy.broadcast_to(arg, (axis_size, *arg.shape))
            for arg, batched in zip(args, in_batched)
        ]
        results = jax.lax.map(lambda args: run(*args), args)
        return results, jax.tree.map(lambda _: True, results)

    return run(coefficients, *arrays)


def no_coefficients() -> jax.Array:
    """For a kernel that needs none."""
    return jax.numpy.zeros((1,), jax.numpy.float32)


def _on_explicit_mesh(on_part, coefficients, arrays):
    # Shards hold whole groups there: checked when the state was made.
    sharding = jax.typeof(arrays[0]).sharding
    spec = _padded(sharding.spec, arrays[0].ndim)

    # Of plain shapes: a kernel reshapes as no type with a sharding lets it, but for a shard.
    plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (coefficients, *arrays)]
    results = jax.eval_shape(functools.partial(on_part, [None] * len(spec)), *plain)
    specs = _specs(spec, arrays)
    # All are laid out so but those that were just made, of the numbers of rows and columns.
    arrays = [
        jax.sharding.reshard(x, NamedSharding(sharding.mesh, s)) for x, s in zip(arrays, specs)
    ]
    return jax.shard_map(
        functools.partial(on_part, spec),
        mesh=sharding.mesh,
        in_specs=(PartitionSpec(), *specs),
        out_specs=tuple(_specs(spec, results)),
        check_vma=False,
    )(coefficients, *arrays)


def _on_auto_mesh(on_part, coefficients, arrays, group):
    # What is partitioned may hold no constants, such as the tables of some kernels.
    nowhere = [None] * arrays[0].ndim
    traced = jax.make_jaxpr(functools.partial(on_part, nowhere))(coefficients, *arrays)
    count = 1 + len(arrays)

    def on_whole(*operands):
        return tuple(jax.core.eval_jaxpr(traced.jaxpr, operands[count:], *operands[:count]))

    partitioned = custom_partitioning(on_whole)

    def partition(mesh, operands, results):
        leaf = operands[1]
        if mesh.empty:  # all are on one device, whatever the mesh of the context
            return mesh, on_whole, _shardings_of(results), _shardings_of(operands)
        spec = _aligned(leaf.sharding, leaf.shape, group)

        def on_shards(*operands):
            return on_part(spec, *operands[:count])

        def shardings(arrays):
            return tuple(NamedSharding(mesh, s) for s in _specs(spec, arrays))

        whole = NamedSharding(mesh, PartitionSpec())
        taken = whole, *shardings(operands[1:count]), *[whole] * len(traced.consts)
        return mesh, on_shards, shardings(results), taken

    def rule(mesh, operands, results):
        blocks, rest = divmod(operands[1].shape[-1], group)
        # Blocks that some axes of the mesh do not divide cannot be spread: the leaf alone is then.
        # An empty mesh: see `partition`.
        blocks = 1 if rest or blocks % max(mesh.size, 1) else blocks
        return _rule(operands[:count], operands[count:], results, blocks)

    partitioned.def_partition(partition=partition, sharding_rule=rule)
    return partitioned(coefficients, *arrays, *traced.consts)


def _shardings_of(arrays):
    return tuple(x.sharding for x in arrays)


def _rule(operands, constants, results, blocks) -> SdyShardingRule:
    """How axes of operands and results belong together: those of the leaf, and whole blocks."""
    arrays = operands[1:]  # after the coefficients
    leaf = arrays[0]
    sizes: dict[str, int] = {}

    def mapping(name, x):
        axes = enumerate(zip(x.shape, leaf.shape))
        factors: list[str | CompoundFactor] = [
            f"leaf{axis}" if size == leaf_size else f"other{name}of{axis}"
            for axis, (size, leaf_size) in axes
        ]
        if blocks > 1 and x.shape[-1] % blocks == 0:
            factors[-1] = _in_blocks(x.shape[-1] // blocks, sizes)
        return ArrayMapping(*factors)

    operand_mappings = [ArrayMapping("whole")]
    operand_mappings += [mapping(i, x) for i, x in enumerate(arrays)]
    for number, constant in enumerate(constants):
        axes = range(len(constant.shape))
        operand_mappings.append(ArrayMapping(*(f"constant{number}of{axis}" for axis in axes)))
    result_mappings = [mapping(_like(x, arrays), x) for x in results]
    mappings = (*operand_mappings, *result_mappings)
    if sizes and not any("blocks" in factors for factors in mappings):
        sizes["blocks"] = blocks
    named: Any = sizes
    return SdyShardingRule(tuple(operand_mappings), tuple(result_mappings), **named)


def _in_blocks(length: int, sizes: dict[str, int]) -> str | CompoundFactor:
    """The factors of an axis of blocks, of which each has ``length``; puts down their sizes."""
    if length == 1:
        return "blocks"
    sizes[f"within{length}"] = length
    return CompoundFactor("blocks", f"within{length}")


def _like(x: Any, operands: Sequence[Any]) -> str:
    """The number of an operand of the same shape: codes are spread as they were before."""
    for i, operand in enumerate(operands):
        if operand.shape == x.shape:
            return str(i)
    return "result"


def _specs(spec: Sequence[Any], arrays: Sequence[Any]) -> list[PartitionSpec]:
    return [
        PartitionSpec(*(None if size == 1 else entry for size, entry in zip(x.shape, spec)))
        for x in arrays
    ]


def _padded(spec: PartitionSpec, ndim: int) -> tuple[Any, ...]:
    return (*spec, *[None] * (ndim - len(spec)))


def _aligned(sharding: Any, shape: tuple[int, ...], group: int) -> tuple[Any, ...]:
    """The spec of a leaf without the entries whose shards would not hold whole groups."""
    entries = []
    for axis, (size, entry) in enumerate(zip(shape, _padded(sharding.spec, len(shape)))):
        parts = math.prod(sharding.mesh.shape[name] for name in mesh_axes(entry))
        unit = group if axis == len(shape) - 1 else 1
        entries.append(entry if size % (parts * unit) == 0 else None)
    return tuple(entries)
