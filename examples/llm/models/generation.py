"""Continuations of texts, from a cache of keys and values."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from examples.llm.models.decoder import Generator
from examples.llm.models.tokenizer import SpecialTokens, plain_tokens

# Continues prompts, int32 `(batch, length)`, of these lengths, int32 `(batch,)`: see `generate`.
Continue = Callable[[jax.Array, jax.Array], jax.Array]


def generate(
    model: Generator,
    prompts: jax.Array,
    lengths: jax.Array,
    *,
    count: int,
    end: int | None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Continue prompts, each as if it were alone.

    A pure function, to be jitted: all but the arrays and the model is static. It ends early where
    all continuations have.

    Args:
      model: a decoder, with what was trained beside it.
      prompts: int32 `(batch, length)`.
      lengths: int32 `(batch,)`: tokens of each prompt, at least one; what is after them is padding.
      count: tokens of a continuation.
      end: after this token a continuation is filled with it; None for no such token.
      temperature: what logits are divided by before a token is drawn; 0 for the likeliest token.
      top_p: tokens are drawn from the likeliest, as few as have this probability together.
      key: a `jax.random.key`, needed unless the temperature is 0.

    Returns:
      int32 `(batch, count)`.

    Raises:
      ValueError: an argument is impossible, or the model has not as many positions.
    """
    _check(count, temperature, top_p, key)
    keys = jax.random.split(jax.random.key(0) if key is None else key, count)
    segments = (jnp.arange(prompts.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
    # A loop may not run a module from outside of it, but one that is made anew of its arrays.
    arrays, structure = jax.tree.flatten(model)
    anew = partial(jax.tree.unflatten, structure, arrays)
    features, cache = anew().remember(prompts, segments, room=count - 1)
    last = jnp.take_along_axis(features, lengths[:, None, None] - 1, axis=1)[:, 0]

    def choose(features: jax.Array, key: jax.Array) -> jax.Array:
        return next_tokens(anew().logits(features), temperature, top_p, key)

    def going_on(state) -> jax.Array:
        number, written, _ = state
        ended = jnp.zeros((), bool) if end is None else jnp.all(written[:, number - 1] == end)
        return (number < count) & ~ended

    def write_next(state):
        number, written, cache = state
        before = jax.lax.dynamic_slice_in_dim(written, number - 1, 1, axis=1)
        features, cache = anew().extend(before, cache)
        token = choose(features[:, 0], keys[number])
        token = token if end is None else jnp.where(before[:, 0] == end, end, token)
        return number + 1, written.at[:, number].set(token), cache

    filling = 0 if end is None else end
    written = (
        jnp.full((len(prompts), count), filling, jnp.int32).at[:, 0].set(choose(last, keys[0]))
    )
    return jax.lax.while_loop(going_on, write_next, (jnp.int32(1), written, cache))[1]


def next_tokens(logits: jax.Array, temperature: float, top_p: float, key: jax.Array) -> jax.Array:
    """Return the likeliest tokens, or draw them, int32 `(batch,)`; see `generate`.

    Args:
      logits: float32 `(batch, vocabulary)`.
      temperature: 0 for the likeliest.
      top_p: above 0.
      key: a `jax.random.key`.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits /= temperature
    if top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(before < top_p, jnp.log(probabilities), -jnp.inf)
        drawn = jax.random.categorical(key, kept)
        return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _check(count: int, temperature: float, top_p: float, key: jax.Array | None) -> None:
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if temperature and key is None:
        raise ValueError(f"a temperature of {temperature} needs a key to draw tokens with")


def continue_text(run: Continue, tokenizer: Tokenizer, text: str, special: SpecialTokens) -> str:
    """Return what a model writes after `text`, up to its token for an end.

    Raises:
      ValueError: there is no token to start from.
    """
    prompt = [*special.front, *plain_tokens(tokenizer, text)]
    if not prompt:
        raise ValueError("text must hold at least one token, got an empty text")
    tokens, length = jnp.array([prompt], jnp.int32), jnp.array([len(prompt)], jnp.int32)
    found = run(tokens, length)[0].tolist()
    if special.end in found:
        found = found[: found.index(special.end)]
    # Decoded together: some tokenizers take a space from the first token.
    return tokenizer.decode(prompt + found).removeprefix(tokenizer.decode(prompt))
