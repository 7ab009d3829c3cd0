"""Prompt tuning: virtual tokens in front of the embedded ones."""

import jax
import jax.numpy as jnp

from optax_lowbit.adapters.virtual_tokens import random_tokens
from optax_lowbit.kernels.reference import widened


def init_prompt(embedding: jax.Array, key: jax.Array | int, *, num_tokens: int = 10) -> jax.Array:
    """A prompt that starts as random tokens of the vocabulary.

    It trains, and everything else is frozen. :func:`prepend` puts it in front of embedded tokens.

    **Memory.** ``num_tokens * hidden`` float32 numbers.

    Args:
      embedding: ``(vocabulary, hidden)``: the embedding of the model.
      key: A `jax.random.key` of Threefry, its data, or a seed.
      num_tokens: Length of the prompt.

    Returns:
      float32 ``(num_tokens, hidden)``: rows of ``embedding``.

    Raises:
      TypeError: If ``key`` is no key.
      ValueError: If ``embedding`` is no matrix, ``num_tokens`` is not an int of at least 1, or
        ``key`` is not one of Threefry.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import adapters
      >>> prompt = adapters.init_prompt(jnp.ones((1000, 64)), key=0)
      >>> embedded = jnp.zeros((2, 7, 64))
      >>> adapters.prepend(prompt, embedded).shape
      (2, 17, 64)

    References:
      Lester et al, `The Power of Scale for Parameter-Efficient Prompt Tuning
      <https://arxiv.org/abs/2104.08691>`_, 2021, Section 3.2, where rows are those of the 5000
      commonest tokens; here of all, as in Zhang et al, `Revisiting Zeroth-Order Optimization for
      Memory-Efficient LLM Fine-Tuning <https://arxiv.org/abs/2402.11592>`_, 2024.
    """
    if jnp.ndim(embedding) != 2:
        raise ValueError(f"embedding must be (vocabulary, hidden), got {jnp.shape(embedding)}")
    return widened(embedding[random_tokens(num_tokens, len(embedding), key)])
