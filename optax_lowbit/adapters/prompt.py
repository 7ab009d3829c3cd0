"""Prompt tuning: virtual tokens in front of the embedded ones."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from optax_lowbit.adapters.virtual_tokens import VirtualTokens, random_tokens
from optax_lowbit.kernels.reference import widened


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt(VirtualTokens):
    """A prompt of vectors, which :func:`prepend` puts in front of embedded tokens. Hashable.

    They train, and everything else is frozen. A function of a parameter tree is given what
    :meth:`init` makes; :meth:`wrap` puts it into a Flax NNX model, as `nnx.LoRAParam`.

    **Memory.** ``num_tokens * hidden`` float32 numbers.

    Attributes:
      num_tokens: Length of the prompt.
      targets: A regular expression, searched for in paths of an NNX model: the `nnx.Embed` of its
        tokens. It has to be given where there are several.

    Raises:
      TypeError, ValueError: At construction, if ``num_tokens`` is not an int of at least 1, or
        ``targets`` is no regular expression.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import adapters
      >>> trainable = adapters.Prompt(num_tokens=10).init(jnp.ones((1000, 64)), key=0)
      >>> embedded = jnp.zeros((2, 7, 64))
      >>> adapters.prepend(trainable, embedded).shape
      (2, 17, 64)

    References:
      Lester et al, `The Power of Scale for Parameter-Efficient Prompt Tuning
      <https://arxiv.org/abs/2104.08691>`_, 2021, Section 3.2, where rows are those of the 5000
      commonest tokens; here of all, as in Zhang et al, `Revisiting Zeroth-Order Optimization for
      Memory-Efficient LLM Fine-Tuning <https://arxiv.org/abs/2402.11592>`_, 2024.
    """

    num_tokens: int = 10

    _layer: ClassVar[str] = "PromptEmbed"

    def init(self, embedding: jax.Array, key: jax.Array | int) -> jax.Array:
        """Random tokens of the vocabulary.

        Args:
          embedding: ``(vocabulary, hidden)``: the embedding of the model.
          key: A `jax.random.key` of Threefry, its data, or a seed.

        Returns:
          float32 ``(num_tokens, hidden)``: rows of ``embedding``.

        Raises:
          TypeError: If ``key`` is no key.
          ValueError: If ``embedding`` is no matrix or has no rows, or ``key`` is not one of
            Threefry.
        """
        if jnp.ndim(embedding) != 2 or not len(embedding):
            raise ValueError(f"embedding must be (vocabulary, hidden), got {jnp.shape(embedding)}")
        return widened(embedding[random_tokens(self.num_tokens, len(embedding), key)])

    def wrap(self, model: Any, key: jax.Array | int) -> Any:
        """A Flax NNX model whose embedding puts a prompt in front of its tokens.

        The model then sees ``num_tokens + length`` positions: a mask that it is given is for so
        many, and the first ``num_tokens`` of its outputs are no predictions.

        Args:
          model: An `nnx.Module`, whose tokens are ``(batch, length)``. It is left as it is; the new
            model shares its variables.
          key: As in :meth:`init`.

        Raises:
          TypeError: If ``key`` is no key.
          ValueError: If ``targets`` chooses no `nnx.Embed`, or several, or the model has a prompt.
        """
        from optax_lowbit.adapters import nnx_virtual_tokens

        return nnx_virtual_tokens.wrap_embedding(self, model, key)
