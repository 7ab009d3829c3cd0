"""Signs from a hash that compiles in no time: for tests of what is done with directions."""

import dataclasses

import jax
import jax.numpy as jnp

from optax_lowbit import zo


@dataclasses.dataclass(frozen=True)
class QuickSigns(zo.Noise):
    """A few multiplications instead of a cipher; signs all the same."""

    def draw(self, probe, rows):
        shape = rows.values.shape
        columns = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1) if shape else 0
        x = (rows.numbers * jnp.uint32(0x9E3779B1) + probe.key[0]) ^ jnp.uint32(columns)
        x = (x * jnp.uint32(0x85EBCA6B)) ^ probe.key[1]
        x = (x ^ (x >> 15)) * jnp.uint32(0xC2B2AE35)
        return jnp.where((x ^ (x >> 13)) & 64, jnp.float32(1), jnp.float32(-1))
