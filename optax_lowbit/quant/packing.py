"""b-bit codes to and from uint8 bytes, along the last axis.

Codes are packed by slices of a group rather than neighbour by neighbour: with four bits, byte ``i``
of a group of ``G`` codes holds code ``i`` in its low nibble and code ``i + G/2`` in its high one.
Packing is then a few slices and shifts on every backend (interleaving neighbours costs 40 times as
many instructions on a TPU), leading axes stay, and a group that lies within a shard stays there.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def group_size(bits: int, block_size: int) -> int:
    """Codes in a group: the least multiple of ``block_size`` that fills whole bytes evenly."""
    codes_per_unit = 8 if bits == 3 else 8 // bits
    return math.lcm(block_size, codes_per_unit)


def packed_size(n: int, bits: int) -> int:
    """Bytes that ``n`` codes take."""
    return -(-n * bits // 8)


def pack(codes: jax.Array, bits: int, group: int) -> jax.Array:
    """Packs uint8 codes ``(..., n)`` below ``2**bits`` into uint8 bytes ``(..., ceil(n*bits/8))``.

    Args:
      codes: uint8, at least one axis.
      bits: 2, 3, 4 or 8.
      group: From :func:`group_size`. A last group that is not full is packed as a smaller one.
    """
    return encode_and_pack(lambda part: part, (codes,), bits, group)


def encode_and_pack(
    encode: Callable[..., jax.Array], arrays: Sequence[jax.Array], bits: int, group: int
) -> jax.Array:
    """``pack(encode(*arrays), ...)`` for an elementwise ``encode``, taking slices before encoding.

    XLA fuses encoding into packing and, for a slice of a value with many uses, computes that value
    once for each use: a nearest-code search on slices of a quotient divides 15 times.
    """
    if bits == 8:
        return encode(*arrays)
    *lead, n = arrays[0].shape
    full = n // group
    parts = []
    if full:
        grouped = [a[..., : full * group].reshape(*lead, full, group) for a in arrays]
        parts.append(_pack_group(encode, grouped, bits).reshape(*lead, full * group * bits // 8))
    if n % group or not full:
        parts.append(_pack_group(encode, [a[..., full * group :] for a in arrays], bits))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def unpack(packed: jax.Array, bits: int, group: int, n: int) -> jax.Array:
    """Inverse of :func:`pack`: bytes ``(..., ceil(n*bits/8))`` to uint8 codes ``(..., n)``."""
    if bits == 8:
        return packed
    *lead, _ = packed.shape
    full = n // group
    group_bytes = group * bits // 8
    parts = []
    if full:
        grouped = packed[..., : full * group_bytes].reshape(*lead, full, group_bytes)
        parts.append(_unpack_group(grouped, bits, group).reshape(*lead, full * group))
    if n % group or not full:
        parts.append(_unpack_group(packed[..., full * group_bytes :], bits, n - full * group))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _pack_group(encode: Callable, arrays: Sequence[jax.Array], bits: int) -> jax.Array:
    if bits != 3:
        return _pack_slices(encode, arrays, bits)
    # Eight 3-bit codes fill three bytes: their two low bits, then their high bits. What is left
    # over (fewer than eight codes) is one little-endian word of just the bytes that it needs.
    codes = encode(*arrays)
    left_over = codes.shape[-1] % 8
    head, rest = (
        codes[..., : codes.shape[-1] - left_over],
        codes[..., codes.shape[-1] - left_over :],
    )
    parts = [
        _pack_slices(lambda part: part & 3, [head], 2),
        _pack_slices(lambda part: part >> 2, [head], 1),
    ]
    if left_over:
        word = rest[..., :1].astype(jnp.uint32)
        for i in range(1, left_over):
            word = word | rest[..., i : i + 1].astype(jnp.uint32) << 3 * i
        parts += [(word >> 8 * i).astype(jnp.uint8) for i in range(packed_size(left_over, 3))]
    return jnp.concatenate(parts, axis=-1)


def _unpack_group(packed: jax.Array, bits: int, n: int) -> jax.Array:
    if bits != 3:
        return _unpack_slices(packed, bits, n)
    left_over = n % 8
    whole = n - left_over
    low = _unpack_slices(packed[..., : whole // 4], 2, whole)
    high = _unpack_slices(packed[..., whole // 4 : 3 * whole // 8], 1, whole)
    parts = [low | high << 2]
    if left_over:
        rest = packed[..., 3 * whole // 8 :].astype(jnp.uint32)
        word = rest[..., :1]
        for i in range(1, rest.shape[-1]):
            word = word | rest[..., i : i + 1] << 8 * i
        parts += [(word >> 3 * i & 7).astype(jnp.uint8) for i in range(left_over)]
    return jnp.concatenate(parts, axis=-1)


def _pack_slices(encode: Callable, arrays: Sequence[jax.Array], bits: int) -> jax.Array:
    """Byte ``i`` of ``h`` holds the codes ``i, i + h, i + 2h, ...``, lowest bits first."""
    size = packed_size(arrays[0].shape[-1], bits)
    packed = encode(*(a[..., :size] for a in arrays))
    for j in range(1, 8 // bits):
        piece = encode(*(a[..., j * size : (j + 1) * size] for a in arrays)) << bits * j
        missing = size - piece.shape[-1]
        if missing:
            piece = jnp.pad(piece, [(0, 0)] * (piece.ndim - 1) + [(0, missing)])
        packed = packed | piece
    return packed


def _unpack_slices(packed: jax.Array, bits: int, n: int) -> jax.Array:
    mask = 2**bits - 1
    pieces = [packed >> bits * j & mask for j in range(8 // bits)]
    codes = jnp.concatenate(pieces, axis=-1)
    return codes[..., :n] if codes.shape[-1] != n else codes
