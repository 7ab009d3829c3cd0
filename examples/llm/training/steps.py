"""One training step with any optimizer, and what it costs."""

import time
from typing import Any, NamedTuple

import jax
import optax

from examples.llm.models.decoder import LanguageModel
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
    """Return the state after a step on `loss_fn(parameters, *args)`, and the loss.

    To be jitted with the state donated, whose memory the new one then takes over.
    """
    parameters, optimizer_state, info = optimizer.step(loss_fn, *state, *args)
    return TrainState(parameters, optimizer_state), info.loss


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
    """Take a step by a compiled `(state, *args) -> (state, loss)`, and wait for it."""
    reset_peak_memory()
    started = time.perf_counter()
    state, loss = train_step(state, *args)
    loss = float(loss)
    seconds = time.perf_counter() - started
    return state, StepMeasurement(loss, seconds, peak_memory_bytes())
