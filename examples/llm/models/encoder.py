"""An encoder in Flax NNX, whose tokens all see each other, and what it is asked for."""

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llm.models.config import EncoderConfig
from examples.llm.models.families import exact_gelu, layer_norm
from examples.llm.models.layers import KeysAndValues, Sight, run_layers, stacked_layers
from examples.llm.models.positions import both_ways, joined
from examples.llm.models.virtual import check_length, with_virtual_tokens


class Encoder(nnx.Module):
    """Embeddings of tokens, their positions and types, a norm, and stacked layers.

    Every parameter of `layers` has a leading axis of `config.num_layers`.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.positions = config.family.positions(config, rngs)
        self.embedding = nnx.Embed(config.vocabulary_size, config.hidden_size, rngs=rngs)
        self.token_types = nnx.Embed(config.num_token_types, config.hidden_size, rngs=rngs)
        for table in (self.embedding, self.token_types):
            table.dtype = None  # its own, which may be other than when it was made
        self.embedding_norm = config.family.norm(config, rngs)
        self.layers = stacked_layers(config, rngs)

    def features(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        /,
        *,
        types: jax.Array | None = None,
        prompt: jax.Array | None = None,
        prefix: KeysAndValues | None = None,
    ) -> jax.Array:
        """Return what heads see, `(batch, length, hidden_size)`, of `tokens` alone.

        Args:
          tokens: int32 `(batch, length)`.
          mask: int32 `(batch, length)`: 1, and 0 for padding; or, without virtual tokens, several
            texts in a row, as of `Decoder.features`. None: nothing is padding.
          types: int32 `(batch, length)`, of a pair of sentences 0 and 1; None: all 0.
          prompt: embeddings `(n, hidden_size)` of virtual tokens in front of every text.
          prefix: keys and values `(num_layers, n, num_heads, head_size)` of virtual tokens in front
            of all others.

        Raises:
          ValueError: there are more tokens than positions.
        """
        x, _ = self._run(tokens, mask, types, prompt, prefix)
        return x[:, -tokens.shape[1] :]

    def keys_and_values(self, tokens: jax.Array) -> KeysAndValues:
        """Return every layer's keys and values of int32 tokens `(length,)`, a prefix."""
        _, own = self._run(tokens[None], None, None, None, None, keep=True)
        return {name: heads[:, 0] for name, heads in own.items()}

    def _run(self, tokens, mask, types, prompt, prefix, *, keep=False):
        """Features of the prompt and the tokens; their keys and values."""
        given = with_virtual_tokens(self.embedding(tokens), mask, prompt, prefix)
        check_length(given, 0, self.positions.limit)
        types = jnp.zeros_like(tokens) if types is None else types
        types = jnp.pad(types, ((0, 0), (given.x.shape[1] - tokens.shape[1], 0)))
        x = self.positions.embed(given.x + self.token_types(types), given.places)
        seen = both_ways(given.places, joined(given.earlier_places, given.places))
        sight = Sight(self.positions, given.places, seen)
        x = self.embedding_norm(x)
        return run_layers(self.layers, self.config, x, sight, given.earlier, keep=keep)


class MaskedLanguageHead(nnx.Module):
    """From features to what the output matrix is multiplied with, and the biases after it."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.dense = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.norm = layer_norm(config, rngs)
        self.bias = nnx.Param(jnp.zeros(config.vocabulary_size))

    def __call__(self, features: jax.Array) -> jax.Array:
        """Map `(..., hidden_size)` to the same shape."""
        return self.norm(exact_gelu(self.dense(features)))


class MaskedLanguageModel(Encoder):
    """An encoder that tells which token a masked one was."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.head = MaskedLanguageHead(config, rngs)

    def logits(self, features: jax.Array, /) -> jax.Array:
        """Map `(..., hidden_size)` to those of the token there, float32 `(..., vocabulary)`."""
        logits = self.embedding.attend(self.head(features)).astype(jnp.float32)
        bias = self.head.bias[...].astype(jnp.float32)
        return logits + jnp.expand_dims(bias, range(logits.ndim - 1))


class ClassificationHead(nnx.Module):
    """From the features of a text's first token to its class."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.dense = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.output = nnx.Linear(config.hidden_size, config.num_classes, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Map `(batch, hidden_size)` to `(batch, num_classes)`."""
        return self.output(jnp.tanh(self.dense(features)))


class Classifier(Encoder):
    """An encoder that tells the class of a text."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.head = ClassificationHead(config, rngs)

    def class_logits(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        /,
        *,
        types: jax.Array | None = None,
        prompt: jax.Array | None = None,
        prefix: KeysAndValues | None = None,
    ) -> jax.Array:
        """Return float32 `(batch, num_classes)`; arguments are those of `features`."""
        features = self.features(tokens, mask, types=types, prompt=prompt, prefix=prefix)
        return self.head(features[:, 0]).astype(jnp.float32)


def sentence_embeddings(encoder: Encoder, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the normalized means of texts' features, as sentence-transformers' models give them.

    Args:
      encoder: the model.
      tokens: int32 `(batch, length)`, the end and the beginning of the text among them.
      mask: int32 `(batch, length)`: 1, and 0 for padding.

    Returns:
      float32 `(batch, hidden_size)`: products are cosines.
    """
    weights = mask[:, :, None].astype(jnp.float32)
    total = jnp.sum(weights * encoder.features(tokens, mask).astype(jnp.float32), axis=1)
    return total / jnp.linalg.norm(total, axis=1, keepdims=True)
