"""Prefix tuning: keys and values in front of those of every layer."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from optax_lowbit.adapters.fields import check_count
from optax_lowbit.adapters.virtual_tokens import VirtualTokens, random_tokens
from optax_lowbit.kernels.reference import widened


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix(VirtualTokens):
    """A prefix of keys and values, which go in front of those of every layer. Hashable.

    They train, and everything else is frozen. A function of a parameter tree is given what
    :meth:`init` makes: in each layer :func:`prepend` puts them in front of the layer's own, and
    :func:`prefix_mask` lets every query attend to them. Real tokens then stand at positions
    ``num_tokens``, ``num_tokens + 1``, ... :meth:`wrap` puts them into the attention of a Flax NNX
    model, as `nnx.LoRAParam`.

    **Memory.** ``2 * layers * num_tokens * key_value_size`` float32 numbers.

    Attributes:
      num_tokens: Length of the prefix.
      targets: A regular expression, searched for in paths of an NNX model: which of its
        `nnx.MultiHeadAttention` have a prefix; all, by default.

    Raises:
      TypeError, ValueError: At construction, if ``num_tokens`` is not an int of at least 1, or
        ``targets`` is no regular expression.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import adapters
      >>> embedding, kernel = jnp.ones((1000, 64)), jnp.ones((64, 32))
      >>> def keys_and_values(tokens):  # of one layer with one head
      ...     heads = embedding[tokens] @ kernel
      ...     return {"keys": heads, "values": 2 * heads}
      >>> prefix = adapters.Prefix(num_tokens=5)
      >>> trainable = prefix.init(keys_and_values, key=0, vocabulary_size=1000)
      >>> trainable["keys"].shape
      (5, 32)

    References:
      Li and Liang, `Prefix-Tuning <https://arxiv.org/abs/2101.00190>`_, 2021. They make the prefix
      by an MLP that is thrown away after training; here it is trained itself, from real
      activations, as in Malladi et al, `Fine-Tuning Language Models with Just Forward Passes
      <https://arxiv.org/abs/2305.17333>`_, 2023, Appendix E.5, who find that zeroth-order methods
      fail from a random prefix.
    """

    num_tokens: int = 5

    _layer: ClassVar[str] = "PrefixAttention"

    def init(
        self,
        keys_and_values: Callable[[jax.Array], Any],
        key: jax.Array | int,
        *,
        vocabulary_size: int,
    ) -> Any:
        """What the model itself computes of random tokens.

        Args:
          keys_and_values: Gives, of int32 tokens ``(num_tokens,)``, each layer's keys and values as
            they enter the attention, positions in them: any pytree of arrays, such as a dict of two
            ``(layers, num_tokens, heads, head_size)``.
          key: A `jax.random.key` of Threefry, its data, or a seed.
          vocabulary_size: Number of tokens to draw from.

        Returns:
          What ``keys_and_values`` gives, in float32.

        Raises:
          TypeError: If ``key`` is no key.
          ValueError: If ``vocabulary_size`` is not an int of at least 1, or ``key`` is not one of
            Threefry.
        """
        check_count("vocabulary_size", vocabulary_size)
        tokens = random_tokens(self.num_tokens, vocabulary_size, key)
        return jax.tree.map(widened, keys_and_values(tokens))

    def wrap(
        self,
        model: Any,
        key: jax.Array | int,
        *,
        vocabulary_size: int,
        call: Callable[[Any, jax.Array], Any] = lambda model, tokens: model(tokens),
    ) -> Any:
        """A Flax NNX model with keys and values in front of those of its attention.

        They start as what the model computes of random tokens. Layers that `nnx.vmap` has stacked
        have stacked ones. Masks stay those of real tokens, and positions are the model's own.

        Args:
          model: An `nnx.Module` with `nnx.MultiHeadAttention` in it, whatever its attention
            function. It is left as it is; the new model shares its variables.
          key: As in :meth:`init`.
          vocabulary_size: Number of tokens to draw from.
          call: Runs a model on int32 tokens ``(1, num_tokens)``, without dropout.

        Raises:
          TypeError: If ``key`` is no key.
          ValueError: If ``vocabulary_size`` is not an int of at least 1, or ``targets`` chooses no
            attention, one that has a prefix or one that ``call`` does not run the tokens through.
        """
        from optax_lowbit.adapters import nnx_virtual_tokens

        check_count("vocabulary_size", vocabulary_size)
        return nnx_virtual_tokens.wrap_attention(self, model, key, vocabulary_size, call)


def prefix_mask(num_tokens: int, length: int) -> jax.Array:
    """Which keys a query attends to: all of the prefix, and real ones that are not after it.

    Args:
      num_tokens: Length of the prefix.
      length: Number of real tokens.

    Returns:
      bool ``(length, num_tokens + length)``.

    Examples:
      >>> from optax_lowbit import adapters
      >>> adapters.prefix_mask(2, 3).astype(int)
      Array([[1, 1, 1, 0, 0],
             [1, 1, 1, 1, 0],
             [1, 1, 1, 1, 1]], dtype=int32)
    """
    return jnp.tri(length, num_tokens + length, num_tokens, dtype=bool)
