"""A decoder-only transformer in Flax NNX."""

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llm.models.config import DecoderConfig
from examples.llm.models.layers import KeysAndValues, Sight, run_layers, stacked_layers
from examples.llm.models.positions import PADDING, Places, backwards, joined
from examples.llm.models.virtual import Input, check_length, with_virtual_tokens
from optax_lowbit import adapters


class LanguageModel(Protocol):
    """What losses see of a decoder: its head apart, so that it need not look at every token."""

    def features(self, tokens: jax.Array, segments: jax.Array | None = None, /) -> jax.Array:
        """Map int32 `(batch, length)` to `(batch, length, size)`; see `Decoder.features`."""
        ...

    def logits(self, features: jax.Array, /) -> jax.Array:
        """Map `(..., size)` to those of the next token, float32 `(..., vocabulary_size)`."""
        ...


class Cache(NamedTuple):
    """What a decoder remembers of the tokens it has seen, and room for more.

    Attributes:
      memory: `(num_layers, batch, room, num_key_value_heads, head_size)`.
      places: of what is in the room, `(batch, room)`; padding where nothing is yet.
      used: how much of the room is, int32 `()`.
      next_position: of each row's text, int32 `(batch,)`.
    """

    memory: KeysAndValues
    places: Places
    used: jax.Array
    next_position: jax.Array


class Generator(LanguageModel, Protocol):
    """What generation sees of a decoder, with whatever was trained beside it."""

    def remember(
        self, tokens: jax.Array, segments: jax.Array, /, *, room: int
    ) -> tuple[jax.Array, Cache]:
        """Return the features of prompts, and a cache with room for `room` more tokens."""
        ...

    def extend(self, tokens: jax.Array, cache: Cache, /) -> tuple[jax.Array, Cache]:
        """Return the features of int32 `(batch, n)` after what is in the cache, and the cache."""
        ...


class Decoder(nnx.Module):
    """Token embedding, stacked layers, final norm and output head.

    Every parameter of `layers` has a leading axis of `config.num_layers`.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        hidden = config.hidden_size
        width = hidden if config.embedding_size is None else config.embedding_size
        self.config = config
        self.positions = config.family.positions(config, rngs)
        self.embedding = nnx.Embed(config.vocabulary_size, width, rngs=rngs)
        self.embedding.dtype = None  # the table's, which may be other than when it was made
        self.layers = stacked_layers(config, rngs)
        self.final_norm = config.family.norm(config, rngs) if config.final_norm else None
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        is_projected, is_tied = width != hidden, config.tied_embeddings
        self.project_in = linear(width, hidden) if is_projected else None
        self.project_out = linear(hidden, width) if is_projected else None
        self.head = None if is_tied else linear(width, config.vocabulary_size)

    def __call__(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        *,
        prompt: jax.Array | None = None,
        prefix: KeysAndValues | None = None,
    ) -> jax.Array:
        """Return next-token logits, float32 `(batch, length, vocabulary_size)`.

        Arguments are those of `features`.
        """
        return self.logits(self.features(tokens, segments, prompt=prompt, prefix=prefix))

    def features(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        /,
        *,
        prompt: jax.Array | None = None,
        prefix: KeysAndValues | None = None,
    ) -> jax.Array:
        """Return what the head sees.

        Args:
          tokens: int32 `(batch, length)`.
          segments: int32 `(batch, length)`: to which text of its row a token belongs, counted from
            1, and 0 for padding. Texts neither see each other nor padding, and each begins at the
            first position; so an attention mask of 1 and 0 is one. None: a row is a text.
          prompt: embeddings `(n, embedding_size)` of virtual tokens in front of every text.
          prefix: keys and values `(num_layers, n, num_key_value_heads, head_size)` of virtual
            tokens in front of all others.

        Returns:
          `(batch, length, embedding_size)`: of `tokens` alone.

        Raises:
          ValueError: there are more tokens than learned positions.
        """
        given = with_virtual_tokens(self.embedding(tokens), segments, prompt, prefix)
        check_length(given, 0, self.positions.limit)
        return self._through(given)[0][:, -tokens.shape[1] :]

    def logits(self, features: jax.Array, /) -> jax.Array:
        """Map `(..., embedding_size)` to float32 `(..., vocabulary_size)`."""
        head = self.embedding.attend if self.head is None else self.head
        return head(features).astype(jnp.float32)

    def keys_and_values(self, tokens: jax.Array) -> KeysAndValues:
        """Return every layer's keys and values of int32 tokens `(length,)`, a prefix."""
        given = with_virtual_tokens(self.embedding(tokens[None]), None, None, None)
        check_length(given, 0, self.positions.limit)
        _, memory = self._through(given, keep=True)
        return {name: heads[:, 0] for name, heads in memory.items()}

    def remember(
        self,
        tokens: jax.Array,
        segments: jax.Array,
        /,
        *,
        room: int,
        prompt: jax.Array | None = None,
        prefix: KeysAndValues | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Return the features of texts, and a cache that has room for `room` more tokens.

        Arguments are those of `features`, with one text in a row.

        Raises:
          ValueError: there are more tokens, with those to come, than positions that are learned, or
            than a context after which all keys change.
        """
        given = with_virtual_tokens(self.embedding(tokens), segments, prompt, prefix)
        check_length(given, room, self.positions.cache_limit)
        features, memory = self._through(given, keep=True)
        if prefix is not None:
            memory = {
                name: jax.vmap(adapters.prepend)(prefix[name], heads)
                for name, heads in memory.items()
            }
        places = joined(given.earlier_places, given.places)
        after = jnp.max(jnp.where(places.segments == PADDING, 0, places.positions + 1), axis=1)
        used = jnp.int32(places.positions.shape[1])
        memory = {name: _padded(heads, room, axis=2) for name, heads in memory.items()}
        places = Places(*(_padded(x, room, axis=1) for x in places))
        return features[:, -tokens.shape[1] :], Cache(memory, places, used, after)

    def extend(self, tokens: jax.Array, cache: Cache, /) -> tuple[jax.Array, Cache]:
        """Return the features of int32 `(batch, n)` after what is in the cache, and the cache."""
        count = tokens.shape[1]
        positions = cache.next_position[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
        places = Places(positions, jnp.ones_like(positions))
        given = Input(self.embedding(tokens), places, cache.memory, cache.places)
        features, own = self._through(given, keep=True)

        def write(room: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(room, new, cache.used, axis)

        return features, Cache(
            {name: write(room, own[name], 2) for name, room in cache.memory.items()},
            Places(*(write(room, new, 1) for room, new in zip(cache.places, places))),
            cache.used + count,
            cache.next_position + count,
        )

    def _through(self, given: Input, *, keep: bool = False) -> tuple[jax.Array, Any]:
        """From embeddings to features; all keys and values if they are kept."""
        x, places = given.x, given.places
        if self.project_in is not None:
            x = self.project_in(x)
        seen = joined(given.earlier_places, places)
        mask = backwards(places, seen, self.config.sliding_window)
        sight = Sight(self.positions, places, mask)
        x = self.positions.embed(x, places)
        x, own = run_layers(self.layers, self.config, x, sight, given.earlier, keep=keep)
        x = x if self.final_norm is None else self.final_norm(x)
        return x if self.project_out is None else self.project_out(x), own


def _padded(x: jax.Array, count: int, axis: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count)
    return jnp.pad(x, widths)
