"""A step of any elementwise optimizer on moments kept in few bits: what every kernel must equal.

Algorithm 1 of the paper for one leaf: dequantize the moments, step in float32, requantize. Large
leaves are processed tile by tile.

References:
  Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
  2023, Algorithm 1.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.kernels import tiling
from optax_lowbit.kernels.meshes import (
    as_varying,
    axes_to_exchange,
    axis_shards,
    varying_axes,
)
from optax_lowbit.quant import QuantizedArray, is_quantized, packing, random_bits
from optax_lowbit.quant.array import (
    code_padding,
    compute_scales,
    decode,
    encode,
    encode_unpacked,
    to_float32,
    with_coded_scales,
    with_float_scales,
)
from optax_lowbit.quant.scaling import Scales, effective_scaling, merge_scales

# (gradient, moments, constants) -> (update, new moments), of one leaf or one tile.
Step = Callable[[jax.Array, dict[str, jax.Array], Any], tuple[jax.Array, dict[str, jax.Array]]]


def update_leaf(
    step: Step,
    grad: jax.Array,
    moments: dict[str, Any],
    key: random_bits.Key | None,
    constants: Any = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """``step`` on one leaf, in tiles if it is large.

    Args:
      step: What the optimizer does to a piece of the leaf in float32.
      grad: The gradient, of any float dtype.
      moments: Arrays and :class:`QuantizedArray`.
      key: For stochastic rounding, or None.
      constants: Pytree of arrays that broadcast to the leaf and have its rank.

    Returns:
      The update, in the gradient's dtype, and new moments, stored as the old ones are.
    """
    groups = [moment.spec.group_size for moment in moments.values() if is_quantized(moment)]
    plan = tiling.plan_tiles(grad.shape, math.lcm(*groups), axis_shards(grad)) if groups else None
    if plan is None:
        return _update_whole(step, grad, moments, key, constants)
    return _update_tiles(plan, step, grad, moments, key, constants)


def _update_whole(step, grad, moments, key, constants):
    floats = {name: _to_float(moment) for name, moment in moments.items()}
    update, new = step(widened(grad), floats, constants)
    stored = {name: stored_like(moment, new[name], name, key) for name, moment in moments.items()}
    return update.astype(grad.dtype), stored


def stored_like(moment: Any, x: jax.Array, name: str, key: random_bits.Key | None) -> Any:
    """``x`` in the way that ``moment`` is stored, with the noise that is its by name."""
    if not is_quantized(moment):
        return x.astype(moment.dtype)
    plain, values = with_float_scales(moment), to_float32(x)
    scales = exchanged(_scales_like(values, plain), plain, x)
    noise = _noise(name, moment, key, random_bits.element_indices(x.shape))
    return scales_stored_like(
        moment, encode(values, scales, plain.spec, plain.dtype, noise), name, key
    )


def scales_stored_like(moment: Any, new: Any, name: str, key: random_bits.Key | None) -> Any:
    """``new``, whose scales are in float32, with 8-bit scales if ``moment`` has them."""
    if not is_quantized(moment) or not moment.spec.double_quant:
        return new
    words = None
    if key is not None:
        words = random_bits.fold_in(moment_key(key, name), 0)
    return with_coded_scales(new, moment.spec, words)


def _update_tiles(plan, step, grad, moments, key, constants):
    """Two passes where scales span tiles: the scales of the new moments, then everything else."""
    old_scales = {n: moment.scales for n, moment in moments.items() if _spans_tiles(moment)}
    stored = {
        name: _Stored(moment.codes, None if name in old_scales else moment.scales)
        if is_quantized(moment)
        else _Stored(moment)
        for name, moment in moments.items()
    }

    def stepped(grad_tile, tiles, old_scales, constants_tile):
        n = grad_tile.shape[-1]
        floats = {
            name: _to_float(tiles[name].like(moment, n, old_scales.get(name)))
            for name, moment in moments.items()
        }
        return step(widened(grad_tile), floats, constants_tile)

    read_only = (grad, stored, old_scales, constants)
    new_scales = _spanning_scales(plan, stepped, read_only, moments) if old_scales else {}

    def body(tile, read_only, carry):
        old_scales, new_scales, constants_tile = read_only
        grad_tile, tiles = carry
        update, new = stepped(grad_tile, tiles, old_scales, constants_tile)
        results = {
            name: _unpacked(name, new[name], moment, new_scales.get(name), key, tile.indices())
            for name, moment in moments.items()
        }
        return update.astype(grad.dtype), results

    # The update is written over the gradient, tile by tile, so that no third buffer is needed.
    update, stored = tiling.over_tiles(
        plan,
        body,
        (old_scales, new_scales, constants),
        (grad, stored),
        pack=lambda results: (results[0], {n: s.packed(moments[n]) for n, s in results[1].items()}),
        unpack=lambda tiles: (
            tiles[0],
            {n: s.unpacked(moments[n], tiles[0].shape[-1]) for n, s in tiles[1].items()},
        ),
    )
    return update, {
        name: stored[name].like(moment, grad.shape[-1], new_scales.get(name))
        for name, moment in moments.items()
    }


def _spanning_scales(plan, stepped, read_only, moments):
    """The new scales that span tiles, by name of their moment, from a pass over all tiles."""
    grad, _, old_scales, _ = read_only

    def body(tile, of_tile, scales):
        del tile
        _, new = stepped(*of_tile)
        return {
            name: merge_scales(scales[name], _scales_like(to_float32(new[name]), moments[name]))
            for name in old_scales
        }

    axes = varying_axes(grad)
    zeros = jax.tree.map(lambda x: as_varying(jnp.zeros_like(x), axes), old_scales)
    new_scales = tiling.over_tiles(plan, body, read_only, zeros)
    return {name: exchanged(x, moments[name], grad) for name, x in new_scales.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Stored:
    """The arrays of a stored moment, without the static part, which a tile does not share."""

    values: jax.Array  # packed codes, or floats
    scales: Any = None  # None also where scales span tiles, and are kept apart

    def like(self, moment, n, scales=None):
        """As ``moment`` is stored, with a last axis of ``n``."""
        if not is_quantized(moment):
            return self.values
        return dataclasses.replace(
            moment,
            codes=self.values,
            scales=self.scales if scales is None else scales,
            padding=code_padding(n, moment.spec.bits),
        )

    def packed(self, moment):
        if not is_quantized(moment):
            return self
        codes = packing.pack(self.values, moment.spec.bits, moment.spec.group_size)
        return dataclasses.replace(self, values=codes)

    def unpacked(self, moment, n):
        if not is_quantized(moment):
            return self
        codes = packing.unpack(self.values, moment.spec.bits, moment.spec.group_size, n)
        return dataclasses.replace(self, values=codes)


def _unpacked(name, x, moment, scales, key, indices) -> _Stored:
    """Float32 ``x`` in the way that ``moment`` is stored, its codes not packed yet."""
    if not is_quantized(moment):
        return _Stored(x.astype(moment.dtype))
    x = to_float32(x)
    noise = _noise(name, moment, key, indices)
    if scales is not None:
        return _Stored(encode_unpacked(x, scales, moment.spec, noise))
    scales = _scales_like(x, moment)
    return _Stored(encode_unpacked(x, scales, moment.spec, noise), scales)


def _spans_tiles(moment) -> bool:
    return is_quantized(moment) and effective_scaling(moment.spec.scaling, moment.ndim) != "block"


def exchanged(scales: Scales, moment: QuantizedArray, leaf: jax.Array) -> Scales:
    """The scales of all shards together, of those of this one inside `jax.shard_map`.

    Args:
      scales: Those of the new moment.
      moment: The old one.
      leaf: The shard.
    """

    def largest(new, old):
        axes = axes_to_exchange(leaf, old)
        if not axes:
            return new
        # As integers, in which NaN is the largest.
        bits = jax.lax.bitcast_convert_type(jnp.abs(new), jnp.int32)
        magnitude = jax.lax.bitcast_convert_type(jax.lax.pmax(bits, axes), jnp.float32)
        if not moment.spec.signed_scale:
            return magnitude
        return jnp.where(jax.lax.pmax(new, axes) < magnitude, -magnitude, magnitude)

    return jax.tree.map(largest, scales, moment.scales)


def _scales_like(x: jax.Array, moment: QuantizedArray):
    axes = len(moment.scales) if isinstance(moment.scales, tuple) else None
    return compute_scales(x, moment.spec, axes)


def _noise(name, moment, key, indices) -> jax.Array | None:
    if moment.spec.rounding != "stochastic":
        return None
    return random_bits.uniform(moment_key(key, name), *indices)


def moment_key(key: random_bits.Key, name: str) -> random_bits.Key:
    """The key of one moment of a leaf."""
    return random_bits.fold_in(key, name_hash(name))


def _to_float(moment) -> jax.Array:
    return decode(moment) if is_quantized(moment) else widened(moment)


def widened(x: jax.Array) -> jax.Array:
    """``x`` in the dtype of maths."""
    return x.astype(float_dtype(x.dtype))


def float_dtype(dtype: Any) -> np.dtype:
    """The dtype of maths, and of moments that are not quantized: float32, or ``dtype`` if wider."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return np.dtype(dtype)
    return np.promote_types(dtype, np.float32)


def name_hash(name: str) -> jax.Array:
    """A number for a name, to fold into keys."""
    return jnp.uint32(name_number(name))


def name_number(name: str) -> int:
    """The same, known in Python."""
    return zlib.crc32(name.encode())
