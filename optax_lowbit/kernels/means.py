"""Row and column means with the same bits on every mesh whose axes divide the device count."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.extend.backend
import jax.numpy as jnp

from optax_lowbit.kernels import backends
from optax_lowbit.kernels.cpu import ops as cpu
from optax_lowbit.kernels.meshes import (
    as_varying,
    axis_shards,
    is_explicit,
    most_shards,
    varying_axes,
)
from optax_lowbit.kernels.partitioning import no_coefficients, per_device
from optax_lowbit.kernels.tiling import as_bits, from_bits, over_tiles, plan_tiles

# Pieces of an axis that are added up one after the other.
_PIECES = 256


class ManualAxes(NamedTuple):
    """The mesh axes that rows and columns of a leaf are spread over inside `jax.shard_map`."""

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


def square_means(
    x: jax.Array, eps1: jax.typing.ArrayLike, backend: str, axes: ManualAxes
) -> tuple[jax.Array, jax.Array]:
    """Means of ``x**2 + eps1`` over the last axis and over the last but one, kept as axes of 1.

    Inside `jax.shard_map`, of the whole of which ``x`` is a shard.

    The native kernel takes both in one pass, with sums of at most 1 unit in the last place for
    every 16 elements away from the reference's. Other platforms use XLA.
    """

    def reference(x, eps1):
        def square(x):
            return jnp.square(x.astype(jnp.float32)) + eps1

        return mean(square, x, -1, axes.columns), mean(square, x, -2, axes.rows)

    @jax.custom_jvp
    def native(x, eps1):
        # Every shard has whole parts, so sums of parts do not depend on how they are spread; unless
        # an axis of the mesh does not divide the number of devices: then a shard is a part.
        shape = x.shape[-2] * _shards(axes.rows), x.shape[-1] * _shards(axes.columns)
        parts = tuple(math.gcd(size, most_shards()) for size in shape)

        def kernel(_, x, *, spread):
            shards = [full // own for full, own in zip(shape, x.shape[-2:])]
            own_parts = (n // k if n % k == 0 else 1 for n, k in zip(parts, shards))
            by_row, by_column = cpu.square_sums(x, *own_parts)
            return (
                _sum_of_parts(by_row, -1, spread[-1] or axes.columns),
                _sum_of_parts(by_column, -2, spread[-2] or axes.rows),
            )

        group = shape[-1] // parts[-1]
        rows, columns = per_device(kernel, no_coefficients(), (x,), group, exchanges=True)
        rows, columns = _agreed(rows, axes.columns), _agreed(columns, axes.rows)
        return rows / shape[-1] + eps1, columns / shape[-2] + eps1

    native.defjvp(lambda primals, tangents: jax.jvp(reference, primals, tangents))
    takes = backend in ("auto", "cpu") and cpu.why_not("square_sums", x.shape, x.dtype) is None
    platforms = jax.extend.backend.backends()
    chosen = {name: "cpu" if takes and name == "cpu" else "reference" for name in platforms}
    run = {"cpu": native, "reference": reference}.__getitem__
    return backends.by_platform(chosen, run, x, jnp.asarray(eps1, jnp.float32))


def _shards(names: tuple[str, ...]) -> int:
    return jax.lax.axis_size(names) if names else 1


def _agreed(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """``x``, not negative and the same on all devices along ``names``, with a type that says so."""
    if not names:
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type(jax.lax.pmax(bits, names), jnp.float32)


def _sum_of_parts(x: jax.Array, axis: int, names: tuple[str, ...]) -> jax.Array:
    """What :func:`_pairwise_sum` gives for all parts, of which each device has some."""
    axis += x.ndim
    shards = _shards(names)
    if shards & (shards - 1):
        x = jax.lax.all_gather(x, names, axis=axis, tiled=True)
        return _pairwise_sum(x, axis)
    distance = shards // 2
    while distance:
        # a + b here and b + a there: the same bits.
        x += jax.lax.ppermute(x, names, [(i, i ^ distance) for i in range(shards)])
        distance //= 2
    return _pairwise_sum(x, axis)


def mean(
    f: Callable[[jax.Array], jax.Array], x: jax.Array, axis: int, names: tuple[str, ...] = ()
) -> jax.Array:
    """Mean of ``f(x)`` along -1 or -2, kept as an axis of 1, with the same bits on every mesh.

    XLA adds up in an order that depends on the shape of a shard. Here pieces, which lie within a
    shard, are added up one after the other, and their sums pairwise; no ``f(x)`` is kept.

    Args:
      f: Elementwise; not negative.
      x: Inside `jax.shard_map` it may be a shard.
      axis: -1 or -2.
      names: The mesh axes that this axis is spread over there.
    """
    size = x.shape[axis] * _shards(names)

    def piece_sums(x):
        return _piece_sums(f, x, axis, names)

    # Whole rows at a time: what one turn reads of a row is a few cache lines, to be used up.
    plan = plan_tiles(x.shape, size, axis_shards(x)) if axis == -1 else None
    if plan is None:
        sums = piece_sums(x)
    else:
        sums = as_varying(jnp.zeros_like(jax.eval_shape(piece_sums, x)), varying_axes(x))
        sums = over_tiles(plan, lambda tile, rows, sums: piece_sums(rows), x, sums)
    return _agreed(_sum_of_parts(sums, axis, names), names) / size


def _piece_sums(f, x: jax.Array, axis: int, names: tuple[str, ...]) -> jax.Array:
    """Sums over about ``_PIECES`` equal pieces of an axis, and ``f`` of what is left over."""
    position = x.ndim + axis
    shards = _shards(names)
    parts = math.gcd(x.shape[axis] * shards, most_shards())
    parts = parts // shards if parts % shards == 0 else 1
    part = x.shape[axis] // parts
    length = max(part // _PIECES, 1)
    turns = part // length
    bits = as_bits(x).reshape(*x.shape[:position], parts, part, *x.shape[position + 1 :])

    def piece(start, length):
        window = jax.lax.dynamic_slice_in_dim(bits, start, length, position + 1)
        return f(from_bits(window, x.dtype))

    sums = jax.lax.fori_loop(
        1, turns, lambda i, sums: sums + piece(i * length, length), piece(0, length)
    )
    if turns * length < part:
        left = piece(turns * length, part - turns * length)
        sums = jnp.concatenate([sums, left], axis=position + 1)
    return sums.reshape(*x.shape[:position], -1, *x.shape[position + 1 :])


def _pairwise_sum(x: jax.Array, axis: int) -> jax.Array:
    if is_explicit(x):
        spec = [*jax.typeof(x).sharding.spec]
        spec[axis] = None
        x = jax.sharding.reshard(x, jax.sharding.PartitionSpec(*spec))
    while x.shape[axis] > 1:
        half, is_odd = divmod(x.shape[axis], 2)
        low = jax.lax.slice_in_dim(x, 0, half, axis=axis)
        high = jax.lax.slice_in_dim(x, half, 2 * half, axis=axis)
        rest = jax.lax.slice_in_dim(x, 2 * half, None, axis=axis)
        x = jnp.concatenate([low + high, rest], axis=axis) if is_odd else low + high
    return x
