"""A decoder-only transformer in Flax NNX whose layers are stacked and run by one scan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llm.config import DecoderConfig
from examples.llm.positions import Positions, rotary_positions


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

    def __call__(self, x: jax.Array, positions: Positions) -> jax.Array:
        """Map `(batch, length, hidden)` to the same shape."""

        def heads(flat: jax.Array) -> jax.Array:
            return flat.reshape(*flat.shape[:2], -1, self.head_size)

        query = positions.turn(heads(self.query(x)))
        key = positions.turn(heads(self.key(x)))
        mixed = jax.nn.dot_product_attention(query, key, heads(self.value(x)), is_causal=True)
        return self.output(mixed.reshape(*x.shape[:2], -1))


class DecoderLayer(nnx.Module):
    """Attention and feed-forward block, each normalized before and added to its input."""

    def __init__(self, config: DecoderConfig, family: Family, rngs: nnx.Rngs):
        self.attention_norm = family.norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = family.norm(config, rngs)
        self.feed_forward = family.feed_forward(config, rngs)

    def __call__(self, x: jax.Array, positions: Positions) -> jax.Array:
        """Map `(batch, length, hidden)` to the same shape."""
        x = x + self.attention(self.attention_norm(x), positions)
        return x + self.feed_forward(self.feed_forward_norm(x))


class LanguageModel(Protocol):
    """What losses see of a decoder: its head apart, so that it need not look at every token."""

    def features(self, tokens: jax.Array) -> jax.Array:
        """Map int32 `(batch, length)` to `(batch, length, hidden_size)`."""
        ...

    def logits(self, features: jax.Array) -> jax.Array:
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
        self.layers = stacked_layers(rngs)
        self.final_norm = family.norm(config, rngs)
        if config.tied_embeddings:
            self.head = None
        else:
            self.head = _linear(config.hidden_size, config.vocabulary_size, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return next-token logits.

        Args:
          tokens: int32 `(batch, length)`.

        Returns:
          float32 `(batch, length, vocabulary_size)`.
        """
        return self.logits(self.features(tokens))

    def features(self, tokens: jax.Array) -> jax.Array:
        """Map int32 `(batch, length)` to what the head sees, `(batch, length, hidden_size)`."""

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run_layer(x: jax.Array, layer: DecoderLayer) -> jax.Array:
            return layer(x, self.positions)

        x = run_layer(self.positions.embed(self.embedding(tokens)), self.layers)
        return self.final_norm(x)

    def logits(self, features: jax.Array) -> jax.Array:
        """Map `(..., hidden_size)` to float32 `(..., vocabulary_size)`."""
        head = self.embedding.attend if self.head is None else self.head
        return head(features).astype(jnp.float32)
