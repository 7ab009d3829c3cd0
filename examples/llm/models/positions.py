"""Where the tokens of a batch stand, which of them see each other, and how a model knows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llm.models.rotary import UNSCALED, RotaryScaling

if TYPE_CHECKING:
    from examples.llm.models.config import DecoderConfig, StackConfig

# Segments that are no texts: padding, and virtual tokens, which all texts of a row have in front.
PADDING, SHARED = 0, -1


class Places(NamedTuple):
    """Where tokens stand.

    Attributes:
      positions: int32 `(batch, length)`, or `(1, length)` for all rows: how many tokens of the same
        text are before a token.
      segments: int32, the same shape: the text of its row that a token is of, counted from 1;
        `PADDING` and `SHARED` for none.
    """

    positions: jax.Array
    segments: jax.Array


def text_places(segments: jax.Array, first: int = 0) -> Places:
    """Return the places of tokens with these segments; texts begin at position `first`."""
    same = segments[:, :, None] == segments[:, None, :]
    return Places(first + jnp.sum(jnp.tril(same, -1), axis=-1, dtype=jnp.int32), segments)


def virtual_places(count: int, first: int = 0) -> Places:
    """Return the places of `count` virtual tokens, the same for all rows."""
    positions = jnp.arange(first, first + count, dtype=jnp.int32)[None]
    return Places(positions, jnp.full_like(positions, SHARED))


def joined(one: Places, other: Places) -> Places:
    """Return the places of tokens and of those that come after them."""
    rows = max(len(one.positions), len(other.positions))
    return Places(
        *(
            jnp.concatenate([jnp.broadcast_to(x, (rows, x.shape[1])) for x in pair], axis=1)
            for pair in zip(one, other, strict=True)
        )
    )


def both_ways(queries: Places, keys: Places) -> jax.Array:
    """Return which queries see which keys in an encoder: bool `(batch or 1, queries, keys)`.

    They are those of the same text, and virtual ones, which see all texts of their row. Padding
    sees padding, so that none sees none.
    """
    own, other = queries.segments[:, :, None], keys.segments[:, None, :]
    return (own == other) | (other == SHARED) | ((own == SHARED) & (other != PADDING))


def backwards(queries: Places, keys: Places, window: int | None = None) -> jax.Array:
    """Return which queries see which keys in a decoder: bool `(batch or 1, queries, keys)`.

    Of those in `both_ways` they are the ones not after them, with a `window` the nearest so many.
    """
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    seen = both_ways(queries, keys) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


class Positions(Protocol):
    """Tells a model where its tokens stand, in the embeddings or in the attention heads."""

    @property
    def limit(self) -> int | None:
        """The most tokens that it has positions for; None for any."""
        ...

    @property
    def cache_limit(self) -> int | None:
        """The most that a cache can be made for."""
        ...

    def embed(self, embedded: jax.Array, places: Places) -> jax.Array:
        """Add positions to embeddings `(batch, length, hidden)`."""
        ...

    def turn(self, heads: jax.Array, places: Places) -> jax.Array:
        """Put positions into queries or keys `(batch, length, heads, head_size)`."""
        ...


@dataclass(frozen=True)
class RotaryPositions:
    """Rotary positions: pair `(i, i + head_size / 2)` turns by its frequency a token.

    This is the half-split layout of Hugging Face checkpoints.

    Attributes:
      base: of the frequencies.
      scaling: how these are stretched.
    """

    base: float
    scaling: RotaryScaling = UNSCALED
    limit = None

    @property
    def cache_limit(self) -> int | None:
        """Beyond it all keys that a cache holds would have to turn again."""
        return self.scaling.limit

    def embed(self, embedded: jax.Array, places: Places) -> jax.Array:
        """Return `embedded` as it is: the positions live in the heads."""
        del places
        return embedded

    def turn(self, heads: jax.Array, places: Places) -> jax.Array:
        """Rotate `(batch, length, heads, head_size)`; the dtype stays, angles are float32."""
        length = jnp.max(places.positions) + 1
        frequencies = self.scaling.frequencies(self.base, heads.shape[3], length)
        angles = (
            places.positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
        )
        cosine, sine = jnp.cos(angles).astype(heads.dtype), jnp.sin(angles).astype(heads.dtype)
        one, other = jnp.split(heads, 2, axis=-1)
        return jnp.concatenate([one * cosine - other * sine, other * cosine + one * sine], axis=-1)


class LearnedPositions(nnx.Module):
    """A vector for each position, added to the embeddings; the first is `table[offset]`."""

    def __init__(self, config: "StackConfig", rngs: nnx.Rngs):
        self.limit = self.cache_limit = config.context_length
        self.offset = config.position_offset
        rows = config.context_length + config.position_offset
        self.table = nnx.Embed(rows, config.hidden_size, rngs=rngs)
        self.table.dtype = None  # its own, which may be other than when it was made

    def embed(self, embedded: jax.Array, places: Places) -> jax.Array:
        """Add positions to embeddings `(batch, length, hidden)`."""
        return embedded + self.table(places.positions + self.offset)

    def turn(self, heads: jax.Array, places: Places) -> jax.Array:
        """Return `heads` as they are: the positions live in the embeddings."""
        del places
        return heads


def rotary_positions(config: "DecoderConfig", rngs: nnx.Rngs) -> RotaryPositions:
    """Build the rotary positions of a decoder; they have no parameters and draw nothing."""
    del rngs
    return RotaryPositions(config.rotary_base, config.rotary_scaling)
