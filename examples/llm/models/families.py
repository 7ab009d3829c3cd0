"""The parts in which families of transformers differ."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from examples.llm.models.positions import LearnedPositions, Positions, rotary_positions

if TYPE_CHECKING:
    from examples.llm.models.config import StackConfig


def rms_norm(config: "StackConfig", rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Build a root-mean-square norm with a scale and no shift."""
    return nnx.RMSNorm(config.hidden_size, epsilon=config.norm_epsilon, rngs=rngs)


def layer_norm(config: "StackConfig", rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Build a norm with a scale and a shift."""
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.norm_epsilon, use_fast_variance=False, rngs=rngs
    )


def exact_gelu(x: jax.Array) -> jax.Array:
    """`x` times the normal distribution function, without the approximation by tanh."""
    return jax.nn.gelu(x, approximate=False)


class SwiGLU(nnx.Module):
    """Gated feed-forward block: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: "StackConfig", rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=config.feed_forward_bias, rngs=rngs)
        self.gate = linear(config.hidden_size, config.feed_forward_size)
        self.up = linear(config.hidden_size, config.feed_forward_size)
        self.down = linear(config.feed_forward_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(batch, length, hidden)` to the same shape."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class MLP(nnx.Module):
    """Feed-forward block: `down(activation(up(x)))`."""

    def __init__(
        self,
        config: "StackConfig",
        rngs: nnx.Rngs,
        *,
        activation: Callable[[jax.Array], jax.Array],
    ):
        linear = partial(nnx.Linear, use_bias=config.feed_forward_bias, rngs=rngs)
        self.activation = activation
        self.up = linear(config.hidden_size, config.feed_forward_size)
        self.down = linear(config.feed_forward_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(batch, length, hidden)` to the same shape."""
        return self.down(self.activation(self.up(x)))


@dataclass(frozen=True)
class Family:
    """The parts in which families differ; a new one brings its own.

    Attributes:
      name: what files call it.
      norm: builds the normalization of the residual stream, of a `StackConfig` and random streams.
      feed_forward: builds the block after the attention.
      positions: builds the `Positions`.
    """

    name: str
    norm: Callable[[Any, nnx.Rngs], nnx.Module]
    feed_forward: Callable[[Any, nnx.Rngs], nnx.Module]
    positions: Callable[[Any, nnx.Rngs], Positions]


LLAMA = Family("llama", rms_norm, SwiGLU, rotary_positions)
MISTRAL = replace(LLAMA, name="mistral")
OPT = Family("opt", layer_norm, partial(MLP, activation=nnx.relu), LearnedPositions)
ROBERTA = Family("roberta", layer_norm, partial(MLP, activation=exact_gelu), LearnedPositions)
BERT = replace(ROBERTA, name="bert")
