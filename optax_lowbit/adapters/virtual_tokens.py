"""Tokens that are no text: vectors, or keys and values, in front of those of real tokens."""

import jax
import jax.numpy as jnp

from optax_lowbit.quant import random_bits


def prepend(virtual: jax.Array, real: jax.Array) -> jax.Array:
    """Puts virtual tokens in front of every sequence of a batch.

    What a model gives at their positions is no prediction: a loss takes ``outputs[:, n:]``.

    Args:
      virtual: ``(n, ...)``: a prompt, or a layer's keys or values of a prefix.
      real: ``(batch, length, ...)``: embedded tokens, or that layer's keys or values.

    Returns:
      ``(batch, n + length, ...)`` in the dtype of ``real``.

    Raises:
      ValueError: If the axes after ``n`` and after ``length`` differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import adapters
      >>> adapters.prepend(jnp.ones((10, 64)), jnp.ones((2, 7, 64), jnp.bfloat16)).shape
      (2, 17, 64)
    """
    if jnp.ndim(real) < 2 or jnp.shape(virtual)[1:] != jnp.shape(real)[2:]:
        raise ValueError(
            "virtual must be (n, ...) with the axes that real, (batch, length, ...), has after its "
            f"second; got {jnp.shape(virtual)} and {jnp.shape(real)}"
        )
    rows = jnp.broadcast_to(virtual.astype(real.dtype)[None], (len(real), *virtual.shape))
    return jnp.concatenate([rows, real], axis=1)


def random_tokens(num_tokens: int, vocabulary_size: int, key: jax.Array | int) -> jax.Array:
    """Tokens drawn with equal chances, with replacement: int32 ``(num_tokens,)``."""
    indices = random_bits.element_indices((num_tokens,))
    uniform = random_bits.uniform(random_bits.key_words(key), *indices)
    return jnp.floor(uniform * jnp.float32(vocabulary_size)).astype(jnp.int32)
