"""One jitted training step for a Flax NNX decoder and any optimizer."""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from examples.llm.models.building import abstract_model
from examples.llm.models.config import DecoderConfig
from examples.llm.models.decoder import Decoder, LanguageModel
from examples.llm.training.memory import peak_memory_bytes, reset_peak_memory
from examples.llm.training.methods import Loss, Optimizer


class TrainState(NamedTuple):
    """What a training step takes and gives back.

    Attributes:
      parameters: what is trained: nested dict of float32 arrays.
      optimizer_state: whatever the optimizer keeps.
    """

    parameters: Any
    optimizer_state: Any


def abstract_decoder(config: DecoderConfig) -> tuple[nnx.GraphDef[Decoder], Any]:
    """Return the decoder's structure and its parameters' shapes, without allocating any."""
    return abstract_model(config)


def build_model(graph: nnx.GraphDef[Decoder], parameters: Any) -> Decoder:
    """Put `parameters`, a nested dict of arrays, into the decoder."""
    return nnx.merge(graph, nnx.State(parameters))


def next_token_loss(model: LanguageModel, windows: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of every token given those before it, float32 `()`.

    Args:
      model: the model.
      windows: int32 `(batch, length + 1)`.
    """
    logits = model.logits(model.features(windows[:, :-1]))
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def take_step(
    loss_fn: Loss, optimizer: Optimizer, state: TrainState, *args: Any
) -> tuple[TrainState, jax.Array]:
    """Return the state after a step on `loss_fn(parameters, *args)`, and the loss."""
    parameters, optimizer_state, info = optimizer.step(loss_fn, *state, *args)
    return TrainState(parameters, optimizer_state), info.loss


def make_train_step(loss_fn: Loss, optimizer: Optimizer) -> Any:
    """Return the jitted step `(state, *args) -> (state, loss)`.

    The old state is donated: the new parameters and optimizer state take over its memory.
    """
    return jax.jit(partial(take_step, loss_fn, optimizer), donate_argnums=0)


class StepMeasurement(NamedTuple):
    """What a step cost.

    Attributes:
      loss: what the step itself found.
      seconds: wall time.
      peak_bytes: highest resident memory of the process meanwhile.
    """

    loss: float
    seconds: float
    peak_bytes: int


def measured_step(
    train_step: Any, state: TrainState, *args: Any
) -> tuple[TrainState, StepMeasurement]:
    """Take a step with what `make_train_step` gave, and wait for it."""
    reset_peak_memory()
    started = time.perf_counter()
    state, loss = train_step(state, *args)
    loss = float(loss)
    seconds = time.perf_counter() - started
    return state, StepMeasurement(loss, seconds, peak_memory_bytes())
