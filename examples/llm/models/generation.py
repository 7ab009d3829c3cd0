"""Greedy continuations of texts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from examples.llm.models.decoder import LanguageModel
from examples.llm.models.tokenizer import NO_SPECIAL_TOKENS, SpecialTokens, plain_tokens

# Gives the logits of `(1, length)` tokens, `(1, length, vocabulary)`; best jitted.
Logits = Callable[[jax.Array], jax.Array]


def continue_greedily(
    logits: Logits,
    tokenizer: Tokenizer,
    text: str,
    count: int,
    special: SpecialTokens = NO_SPECIAL_TOKENS,
) -> str:
    """Return the tokens that the model finds likeliest after `text`, as text.

    They are `count`, or fewer if the model's token for an end is among them.

    The whole sequence goes through the model for every token, padded to its final length so
    that the model compiles once; causal attention never sees the padding.
    """
    begin = [] if special.begin is None else [special.begin]
    prompt = begin + plain_tokens(tokenizer, text)
    if not prompt:
        raise ValueError("text must hold at least one token, got an empty text")
    tokens = (
        jnp.zeros((1, len(prompt) + count), jnp.int32)
        .at[0, : len(prompt)]
        .set(jnp.array(prompt, jnp.int32))
    )
    found = []
    for position in range(len(prompt), len(prompt) + count):
        next_token = int(jnp.argmax(logits(tokens)[0, position - 1]))
        if next_token == special.end:
            break
        found.append(next_token)
        tokens = tokens.at[0, position].set(next_token)
    return tokenizer.decode(found)


def generate(
    model: LanguageModel,
    prompts: jax.Array,
    lengths: jax.Array,
    *,
    count: int,
    end: int | None,
) -> jax.Array:
    """Continue prompts greedily; all but the arrays and the model is static.

    Args:
      model: the model.
      prompts: int32 `(batch, length)`.
      lengths: int32 `(batch,)`: tokens of each prompt, at least one; what is after them is padding.
      count: tokens of a continuation.
      end: after this token a continuation is filled with it; None for no such token.

    Returns:
      int32 `(batch, count)`.
    """
    size = len(prompts)
    rows = jnp.arange(size)
    tokens = jnp.pad(prompts, ((0, 0), (0, count)))
    written = jnp.zeros((size, count), jnp.int32)
    ended = jnp.zeros(size, bool)
    for number in range(count):
        last = model.features(tokens)[rows, lengths + (number - 1)]
        token = jnp.argmax(model.logits(last), axis=-1).astype(jnp.int32)
        if end is not None:
            token = jnp.where(ended, end, token)
            ended = token == end
        written = written.at[:, number].set(token)
        tokens = tokens.at[rows, lengths + number].set(token)
    return written
