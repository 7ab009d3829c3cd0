"""Random directions: each element a function of a key, its row and its column.

Bits are those of Threefry-2x32 in counter mode (:mod:`optax_lowbit.quant.random_bits`), so noise is
the same on every mesh, in any order of leaves, and can be made for a few rows alone. A leaf's key
comes from its path.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_lowbit.quant import random_bits
from optax_lowbit.zo.rows import Rows

_ONE = 0x3F800000  # the bits of float32 1.0
_SIGN = 0x80000000


class Probe(NamedTuple):
    """What a direction is drawn from.

    Attributes:
      key: Of this probe of this step; two uint32 words.
      run: Of the whole run, for what is drawn anew only every so many steps.
      step: int32 ``()``: steps taken before this one.
      prepared: What :meth:`Noise.prepare` gave.
    """

    key: random_bits.Key
    run: random_bits.Key
    step: jax.Array
    prepared: Any = ()


@dataclasses.dataclass(frozen=True)
class Noise:
    """A distribution of directions ``z`` with ``E[z z^T] = I`` on what it spans."""

    def prepare(self, prepared: Any, params: Any, run: random_bits.Key, step: jax.Array) -> Any:
        """What :attr:`Probe.prepared` is in a step: small arrays; ``()`` before the first.

        Args:
          prepared: What it was in the step before.
          params: The :class:`~optax_lowbit.zo.directions.Trainable`.
          run: The run's key.
          step: Steps taken.
        """
        del params, run, step
        return prepared

    def draw(self, probe: Probe, rows: Rows, path_hash: jax.Array) -> jax.Array:
        """The direction's rows: float32 of the shape of ``rows.values``."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Rademacher(Noise):
    """Signs, each with probability one half: the least variance of all independent ``z``.

    Examples:
      >>> from optax_lowbit import zo
      >>> opt = zo.zo_sgd(1e-6, noise=zo.Rademacher())
    """

    def draw(self, probe, rows, path_hash):
        """One block of the cipher is 64 signs of a row."""
        key = random_bits.fold_in(probe.key, path_hash)
        n = rows.values.shape[-1] if rows.values.ndim else 1
        words = _words(key, rows.numbers, -(-n // 64))
        return unpack_signs(words, n).reshape(rows.values.shape)


@dataclasses.dataclass(frozen=True)
class Gaussian(Noise):
    """Standard normal values, as in MeZO; 20 times the cost of :class:`Rademacher` on a CPU."""

    def draw(self, probe, rows, path_hash):
        """One block of the cipher is two values of a row."""
        key = random_bits.fold_in(probe.key, path_hash)
        n = rows.values.shape[-1] if rows.values.ndim else 1
        words = _words(key, rows.numbers, -(-n // 2))[..., :n]
        return standard_normal(words).reshape(rows.values.shape)


def _words(key: random_bits.Key, rows: jax.Array, blocks: int) -> jax.Array:
    """uint32 ``(..., 2 * blocks)``: so many blocks of the cipher for each of ``rows`` (..., 1)."""
    rows = rows.reshape(*rows.shape[:-1], 1)
    shape = (*rows.shape[:-1], blocks)
    columns = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    pair = random_bits.threefry2x32(key, jnp.broadcast_to(rows, shape), columns)
    return jnp.stack(pair, axis=-1).reshape(*shape[:-1], 2 * blocks)


def unpack_signs(words: jax.Array, n: int) -> jax.Array:
    """The first ``n`` signs of each row of uint32 words, 32 in each, as float32 1 and -1."""
    places = jax.lax.broadcasted_iota(jnp.uint32, (*words.shape, 32), words.ndim)
    bits = (words[..., None] << places) & jnp.uint32(_SIGN) | jnp.uint32(_ONE)
    signs = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return signs.reshape(*words.shape[:-1], -1)[..., :n]


def standard_normal(words: jax.Array) -> jax.Array:
    """A standard normal value for each uint32 word, by the inverse of its distribution."""
    mantissa = jax.lax.bitcast_convert_type(words >> 9 | jnp.uint32(_ONE), jnp.float32)
    # Symmetric about zero, and never -1 or 1.
    uniform = (mantissa - jnp.float32(1.5)) * jnp.float32(2) + jnp.float32(2**-23)
    return jnp.float32(2**0.5) * jax.lax.erf_inv(uniform)
