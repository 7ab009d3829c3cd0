"""A decoder-only transformer in Flax NNX whose layers are stacked and run by one scan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llm.models.config import DecoderConfig
from examples.llm.models.positions import Positions, rotary_positions
from optax_lowbit import adapters

# "keys" and "values" of one layer, `(..., tokens, num_key_value_heads, head_size)`, or of all,
# stacked.
KeysAndValues = dict[str, jax.Array]


@dataclass(frozen=True)
class Family:
    """The parts in which decoder families differ; a new family brings its own.

    Attributes:
      norm: builds the normalization of the residual stream.
      feed_forward: builds the block after the attention.
      positions: builds the `Positions`.
    """

    norm: Callable[[DecoderConfig, nnx.Rngs], nnx.Module]
    feed_forward: Callable[[DecoderConfig, nnx.Rngs], nnx.Module]
    positions: Callable[[DecoderConfig, nnx.Rngs], Positions]


def _linear(size_in: int, size_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(size_in, size_out, use_bias=False, rngs=rngs)


def rms_norm(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Build a root-mean-square norm with a scale and no shift."""
    return nnx.RMSNorm(config.hidden_size, epsilon=config.norm_epsilon, rngs=rngs)


class SwiGLU(nnx.Module):
    """Gated feed-forward block: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.gate = _linear(config.hidden_size, config.feed_forward_size, rngs)
        self.up = _linear(config.hidden_size, config.feed_forward_size, rngs)
        self.down = _linear(config.feed_forward_size, config.hidden_size, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(batch, length, hidden)` to the same shape."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


LLAMA = Family(norm=rms_norm, feed_forward=SwiGLU, positions=rotary_positions)


class Attention(nnx.Module):
    """Causal attention in which groups of query heads share a key and a value head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.head_size = config.head_size
        query_size = config.num_heads * config.head_size
        key_value_size = config.num_key_value_heads * config.head_size
        self.query = _linear(config.hidden_size, query_size, rngs)
        self.key = _linear(config.hidden_size, key_value_size, rngs)
        self.value = _linear(config.hidden_size, key_value_size, rngs)
        self.output = _linear(query_size, config.hidden_size, rngs)

    def keys_and_values(self, x: jax.Array, positions: Positions, first: int) -> KeysAndValues:
        """Return what `(batch, length, hidden)` at positions `first`, ... offers to queries."""
        keys = positions.turn(self._heads(self.key(x)), first)
        return {"keys": keys, "values": self._heads(self.value(x))}

    def __call__(
        self, x: jax.Array, positions: Positions, prefix: KeysAndValues | None = None
    ) -> jax.Array:
        """Map `(batch, length, hidden)`, which comes after the prefix, to the same shape."""
        first = prefix_length(prefix)
        query = positions.turn(self._heads(self.query(x)), first)
        seen, mask = self.keys_and_values(x, positions, first), None
        if prefix is not None:
            seen = jax.tree.map(adapters.prepend, prefix, seen)
            mask = adapters.prefix_mask(first, x.shape[1])[None, None]
        mixed = jax.nn.dot_product_attention(
            query, seen["keys"], seen["values"], mask=mask, is_causal=prefix is None
        )
        return self.output(mixed.reshape(*x.shape[:2], -1))

    def _heads(self, flat: jax.Array) -> jax.Array:
        return flat.reshape(*flat.shape[:2], -1, self.head_size)


def prefix_length(prefix: KeysAndValues | None) -> int:
    """Return how many tokens a prefix stands for."""
    return 0 if prefix is None else prefix["keys"].shape[-3]


class DecoderLayer(nnx.Module):
    """Attention and feed-forward block, each normalized before and added to its input."""

    def __init__(self, config: DecoderConfig, family: Family, rngs: nnx.Rngs):
        self.attention_norm = family.norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = family.norm(config, rngs)
        self.feed_forward = family.feed_forward(config, rngs)

    def __call__(
        self, x: jax.Array, positions: Positions, prefix: KeysAndValues | None = None
    ) -> jax.Array:
        """Map `(batch, length, hidden)` to the same shape."""
        x = x + self.attention(self.attention_norm(x), positions, prefix)
        return x + self.feed_forward(self.feed_forward_norm(x))


class LanguageModel(Protocol):
    """What losses see of a decoder: its head apart, so that it need not look at every token."""

    def features(self, tokens: jax.Array, /) -> jax.Array:
        """Map int32 `(batch, length)` to `(batch, length, hidden_size)`."""
        ...

    def logits(self, features: jax.Array, /) -> jax.Array:
        """Map `(..., hidden_size)` to those of the next token, `(..., vocabulary_size)`."""
        ...


class Decoder(nnx.Module):
    """Token embedding, stacked layers, final norm and output head.

    Every parameter of `layers` has a leading axis of `config.num_layers`, so that the program
    holds one layer however deep the model is. A layer's activations are computed again in the
    backward pass instead of being kept.
    """

    def __init__(self, config: DecoderConfig, *, family: Family = LLAMA, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked_layers(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, family, rngs)

        self.positions = family.positions(config, rngs)
        self.embedding = nnx.Embed(config.vocabulary_size, config.hidden_size, rngs=rngs)
        self.embedding.dtype = None  # the table's, which may be other than when it was made
        self.layers = stacked_layers(rngs)
        self.final_norm = family.norm(config, rngs)
        if config.tied_embeddings:
            self.head = None
        else:
            self.head = _linear(config.hidden_size, config.vocabulary_size, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        prompt: jax.Array | None = None,
        prefix: KeysAndValues | None = None,
    ) -> jax.Array:
        """Return next-token logits.

        Args:
          tokens: int32 `(batch, length)`.
          prompt: embeddings `(n, hidden)` of virtual tokens in front of `tokens`.
          prefix: keys and values `(num_layers, n, num_key_value_heads, head_size)` of virtual
            tokens in front of all others.

        Returns:
          float32 `(batch, length, vocabulary_size)`: of `tokens` alone.
        """
        return self.logits(self.features(tokens, prompt=prompt, prefix=prefix))

    def features(
        self,
        tokens: jax.Array,
        /,
        *,
        prompt: jax.Array | None = None,
        prefix: KeysAndValues | None = None,
    ) -> jax.Array:
        """Return what the head sees, `(batch, length, hidden_size)`; arguments as of a call."""

        @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run_layer(x: jax.Array, layer: DecoderLayer, prefix: KeysAndValues | None) -> jax.Array:
            return layer(x, self.positions, prefix)

        x = self.embedding(tokens)
        if prompt is not None:
            x = adapters.prepend(prompt, x)
        x = run_layer(self.positions.embed(x, prefix_length(prefix)), self.layers, prefix)
        return self.final_norm(x[:, -tokens.shape[1] :])

    def logits(self, features: jax.Array, /) -> jax.Array:
        """Map `(..., hidden_size)` to float32 `(..., vocabulary_size)`."""
        head = self.embedding.attend if self.head is None else self.head
        return head(features).astype(jnp.float32)

    def keys_and_values(self, tokens: jax.Array) -> KeysAndValues:
        """Return every layer's keys and values of int32 tokens `(length,)`, a prefix."""

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def run_layer(x: jax.Array, layer: DecoderLayer) -> tuple[jax.Array, KeysAndValues]:
            seen = layer.attention.keys_and_values(layer.attention_norm(x), self.positions, 0)
            return layer(x, self.positions), jax.tree.map(lambda heads: heads[0], seen)

        x = self.positions.embed(self.embedding(tokens[None]), 0)
        return run_layer(x, self.layers)[1]
