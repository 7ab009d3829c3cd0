"""A checksum of an array that is computed where its shards lie, and is the same on every mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.kernels.meshes import on_own_mesh
from optax_lowbit.quant.random_bits import element_indices


def checksum(x: jax.Array | np.ndarray | np.generic) -> Any:
    r"""A 32-bit sum over all elements of a hash of value and position, as a uint32 scalar.

    With the 32-bit words :math:`w_i` of the array (smaller elements are a word each, larger ones
    several) and :math:`f` the finalizer of MurmurHash3, a bijection of words:
    :math:`\sum_i f(w_i \oplus i\,c) \bmod 2^{32}`. Another value in one place always changes it;
    any other change goes unnoticed with a probability of :math:`2^{-32}`. Shards are added up where
    they lie: only the sums are exchanged.
    """
    if isinstance(x, np.ndarray | np.generic):
        words = _host_words(x)
        return _mixed_sum(words, np.arange(words.size, dtype=np.uint32), np)
    with on_own_mesh(x):
        return _on_devices(jax.device_put(x, jax.memory.Space.Device))


@jax.jit
def _on_devices(x: jax.Array) -> jax.Array:
    words = _words(x)
    row, column = element_indices(words.shape)
    width = words.shape[-1] if words.ndim else 1
    return _mixed_sum(words, row * jnp.uint32(width & 0xFFFFFFFF) + column, jnp)


def _mixed_sum(words: Any, index: Any, xp: Any) -> Any:
    mixed = words ^ (index * xp.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ mixed >> shift) * xp.uint32(factor)
    return xp.sum(mixed ^ mixed >> 16, dtype=xp.uint32)


def _words(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)


def _host_words(x: np.ndarray | np.generic) -> np.ndarray:
    """The words of an array of NumPy, which JAX might not take as it is (64 bits)."""
    kind = {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32)
    return np.frombuffer(x.tobytes(), kind).astype(np.uint32)
