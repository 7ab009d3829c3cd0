"""Greedy continuation of a text."""

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer

from examples.llm.decoder import Decoder


@nnx.jit
def _most_likely_next(model: Decoder, tokens: jax.Array, position: jax.Array) -> jax.Array:
    return jnp.argmax(model(tokens)[0, position]).astype(jnp.int32)


def continue_greedily(model: Decoder, tokenizer: Tokenizer, text: str, count: int) -> str:
    """Return the `count` tokens that the model finds likeliest after `text`, as text.

    The whole sequence goes through the model for every token, padded to its final length so
    that the model compiles once; causal attention never sees the padding.
    """
    prompt = tokenizer.encode(text).ids
    if not prompt:
        raise ValueError("text must hold at least one token, got an empty text")
    tokens = (
        jnp.zeros((1, len(prompt) + count), jnp.int32)
        .at[0, : len(prompt)]
        .set(jnp.array(prompt, jnp.int32))
    )
    for position in range(len(prompt), len(prompt) + count):
        next_token = _most_likely_next(model, tokens, jnp.int32(position - 1))
        tokens = tokens.at[0, position].set(next_token)
    return tokenizer.decode(tokens[0, len(prompt) :].tolist())
