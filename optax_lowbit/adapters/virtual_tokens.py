"""Tokens that are no text: vectors, or keys and values, in front of those of real tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from optax_lowbit.adapters.fields import check_count
from optax_lowbit.moments.policy import compiled_pattern
from optax_lowbit.quant import random_bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class VirtualTokens:
    """What a prompt and a prefix share: how many, and how to get them out of an NNX model."""

    num_tokens: int
    targets: str = ""

    # What `wrap` puts into a model, by its name in `nnx_virtual_tokens`, which imports Flax.
    _layer: ClassVar[str]

    def __post_init__(self):
        check_count("num_tokens", self.num_tokens)
        compiled_pattern("targets", self.targets)

    def unwrap(self, model: Any) -> Any:
        """The model that :meth:`wrap` gave without what it put in; it is left as it is."""
        from optax_lowbit.adapters import nnx_virtual_tokens

        return nnx_virtual_tokens.unwrap_virtual(model, self._layer)

    def extract(self, model: Any) -> dict[str, dict[str, jax.Array]]:
        """What trains of a model that :meth:`wrap` gave, by the path of its layer."""
        from optax_lowbit.adapters import nnx_virtual_tokens

        return nnx_virtual_tokens.extract_virtual(model, self._layer)

    def update(self, model: Any, adapters: Mapping[str, Mapping[str, jax.Array]]) -> None:
        """Puts what :meth:`extract` gave of another such model into this one, in place.

        Raises:
          ValueError: If paths or shapes are not those of the model.
        """
        from optax_lowbit.adapters import nnx_virtual_tokens

        nnx_virtual_tokens.update_virtual(model, self._layer, adapters)


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
