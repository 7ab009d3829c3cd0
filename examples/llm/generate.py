"""Greedy continuation of a text."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

# Gives the logits of `(1, length)` tokens, `(1, length, vocabulary)`; best jitted.
Logits = Callable[[jax.Array], jax.Array]


def continue_greedily(logits: Logits, tokenizer: Tokenizer, text: str, count: int) -> str:
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
        next_token = jnp.argmax(logits(tokens)[0, position - 1]).astype(jnp.int32)
        tokens = tokens.at[0, position].set(next_token)
    return tokenizer.decode(tokens[0, len(prompt) :].tolist())
