"""How a decoder knows the order of its tokens."""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llm.models.config import DecoderConfig


class Positions(Protocol):
    """Tells a decoder where its tokens stand, in the embeddings or in the attention heads."""

    def embed(self, embedded: jax.Array, first: int) -> jax.Array:
        """Add positions `first`, `first + 1`, ... to embeddings `(batch, length, hidden)`."""
        ...

    def turn(self, heads: jax.Array, first: int) -> jax.Array:
        """Put these positions into queries or keys `(batch, length, heads, head_size)`."""
        ...


@dataclass(frozen=True)
class RotaryPositions:
    """Rotary positions: pair `(i, i + head_size / 2)` turns by `base**(-2i / head_size)` a token.

    This is the half-split layout of Hugging Face checkpoints.
    """

    base: float

    def embed(self, embedded: jax.Array, first: int) -> jax.Array:
        """Return `embedded` as it is: the positions live in the heads."""
        del first
        return embedded

    def turn(self, heads: jax.Array, first: int) -> jax.Array:
        """Rotate `(batch, length, heads, head_size)`; the dtype stays, angles are float32."""
        length, head_size = heads.shape[1], heads.shape[3]
        exponents = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
        positions = jnp.arange(first, first + length, dtype=jnp.float32)
        angles = jnp.outer(positions, self.base**-exponents)[None, :, None, :]
        cosine, sine = jnp.cos(angles).astype(heads.dtype), jnp.sin(angles).astype(heads.dtype)
        one, other = jnp.split(heads, 2, axis=-1)
        return jnp.concatenate([one * cosine - other * sine, other * cosine + one * sine], axis=-1)


def rotary_positions(config: DecoderConfig, rngs: nnx.Rngs) -> RotaryPositions:
    """Build the rotary positions of a decoder; they have no parameters and draw nothing."""
    del rngs
    return RotaryPositions(config.rotary_base)
