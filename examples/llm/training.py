"""One jitted training step for a Flax NNX decoder and any Optax optimizer."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.llm.config import DecoderConfig
from examples.llm.decoder import Decoder


class TrainState(NamedTuple):
    """What a training step takes and gives back.

    Attributes:
      parameters: nested dict of float32 arrays.
      optimizer_state: state of the Optax transformation.
    """

    parameters: Any
    optimizer_state: Any


def abstract_decoder(config: DecoderConfig) -> tuple[nnx.GraphDef[Decoder], Any]:
    """Return the decoder's structure and its parameters' shapes, without allocating any."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def build_model(graph: nnx.GraphDef[Decoder], parameters: Any) -> Decoder:
    """Put `parameters`, a nested dict of arrays, into the decoder."""
    return nnx.merge(graph, nnx.State(parameters))


def next_token_loss(graph: nnx.GraphDef[Decoder], parameters: Any, windows: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of every token given those before it, float32 `()`.

    Args:
      graph: structure of the decoder.
      parameters: its parameters.
      windows: int32 `(batch, length + 1)`.
    """
    logits = build_model(graph, parameters)(windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def make_train_step(graph: nnx.GraphDef[Decoder], optimizer: optax.GradientTransformation) -> Any:
    """Return the jitted step `(state, windows) -> (state, loss)`.

    The old state is donated: the new parameters and optimizer state take over its memory.
    """

    def train_step(state: TrainState, windows: jax.Array) -> tuple[TrainState, jax.Array]:
        loss, gradients = jax.value_and_grad(next_token_loss, argnums=1)(
            graph, state.parameters, windows
        )
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer_state, state.parameters
        )
        parameters = optax.apply_updates(state.parameters, updates)
        return TrainState(parameters, optimizer_state), loss

    return jax.jit(train_step, donate_argnums=0)


def held_out_loss(
    graph: nnx.GraphDef[Decoder], parameters: Any, batches: Iterable[np.ndarray]
) -> float:
    """Return the mean of `next_token_loss` over `batches` of int32 `(batch, length + 1)`."""
    loss = jax.jit(next_token_loss, static_argnums=0)
    return float(np.mean([loss(graph, parameters, jnp.asarray(batch)) for batch in batches]))
