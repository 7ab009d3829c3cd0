"""The layer that decoders and encoders are made of, stacked, and how a stack is run."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llm.models.config import StackConfig
from examples.llm.models.positions import Places, Positions

# "keys" and "values" of one layer, `(batch, tokens, num_key_value_heads, head_size)`, or of all,
# stacked.
KeysAndValues = dict[str, jax.Array]


class Sight(NamedTuple):
    """What a layer's tokens see; the same for all layers.

    Attributes:
      positions: of the model.
      places: of the tokens.
      mask: bool `(batch or 1, queries, keys)`, which see which; keys of earlier tokens, if there
        are any, are first.
    """

    positions: Positions
    places: Places
    mask: jax.Array


class Attention(nnx.Module):
    """Attention in which groups of query heads share a key and a value head."""

    def __init__(self, config: StackConfig, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=config.attention_bias, rngs=rngs)
        self.head_size = config.head_size
        query_size = config.num_heads * config.head_size
        key_value_size = config.num_key_value_heads * config.head_size
        self.query = linear(config.hidden_size, query_size)
        self.key = linear(config.hidden_size, key_value_size)
        self.value = linear(config.hidden_size, key_value_size)
        self.output = linear(query_size, config.hidden_size)

    def __call__(
        self, x: jax.Array, sight: Sight, earlier: KeysAndValues | None
    ) -> tuple[jax.Array, KeysAndValues]:
        """Map `(batch, length, hidden)` to the same shape, and to its own keys and values.

        `earlier` are those of tokens in front, of every row or, `(1, ...)`, of all rows.
        """

        def turned(heads: jax.Array) -> jax.Array:
            return sight.positions.turn(heads, sight.places)

        query = turned(self._heads(self.query(x)))
        own = {"keys": turned(self._heads(self.key(x))), "values": self._heads(self.value(x))}
        seen = own if earlier is None else jax.tree.map(_in_front, earlier, own)
        mixed = jax.nn.dot_product_attention(
            query, seen["keys"], seen["values"], mask=sight.mask[:, None]
        )
        return self.output(mixed.reshape(*x.shape[:2], -1)), own

    def _heads(self, flat: jax.Array) -> jax.Array:
        return flat.reshape(*flat.shape[:2], -1, self.head_size)


def _in_front(earlier: jax.Array, own: jax.Array) -> jax.Array:
    rows = jnp.broadcast_to(earlier, (len(own), *earlier.shape[1:]))
    return jnp.concatenate([rows.astype(own.dtype), own], axis=1)


class Layer(nnx.Module):
    """Attention and feed-forward block, each added to its input, and normalized before or after."""

    def __init__(self, config: StackConfig, rngs: nnx.Rngs):
        self.norm_first = config.norm_first
        self.attention_norm = config.family.norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = config.family.norm(config, rngs)
        self.feed_forward = config.family.feed_forward(config, rngs)

    def __call__(
        self, x: jax.Array, sight: Sight, earlier: KeysAndValues | None
    ) -> tuple[jax.Array, KeysAndValues]:
        """Map `(batch, length, hidden)` to the same shape, and to its own keys and values."""
        if self.norm_first:
            mixed, own = self.attention(self.attention_norm(x), sight, earlier)
            x = x + mixed
            return x + self.feed_forward(self.feed_forward_norm(x)), own
        mixed, own = self.attention(x, sight, earlier)
        x = self.attention_norm(x + mixed)
        return self.feed_forward_norm(x + self.feed_forward(x)), own


def stacked_layers(config: StackConfig, rngs: nnx.Rngs) -> Layer:
    """Build a stack: a layer whose parameters have a leading axis of `config.num_layers`."""

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap
    def build(rngs: nnx.Rngs) -> Layer:
        return Layer(config, rngs)

    return build(rngs)


def run_layers(
    layers: Layer,
    config: StackConfig,
    x: jax.Array,
    sight: Sight,
    earlier: KeysAndValues | None = None,
    *,
    keep: bool = False,
) -> tuple[jax.Array, Any]:
    """Run a stack; what a layer computes is computed again in the backward pass.

    Args:
      layers: the stack.
      config: its shape.
      x: `(batch, length, hidden)`.
      sight: what tokens see.
      earlier: keys and values of tokens in front, `(num_layers, batch or 1, ...)`.
      keep: whether to return the keys and values of `x`.

    Returns:
      `(batch, length, hidden)`, and the keys and values of all layers, or None.
    """
    unroll = 1 if config.scan_layers else config.num_layers

    @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0), unroll=unroll)
    @nnx.remat
    def run_layer(x: jax.Array, layer: Layer, earlier: KeysAndValues | None) -> Any:
        x, own = layer(x, sight, earlier)
        return x, own if keep else None

    return run_layer(x, layers, earlier)
