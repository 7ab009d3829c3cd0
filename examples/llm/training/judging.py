"""What a kind of data must offer, and how a model is judged by it."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import grain
import jax

from examples.llm.models.decoder import Generator

# Choices, as of a learning rate or of the best step, are made by the one; the other is reported.
Part = Literal["dev", "test"]


class Evaluation(NamedTuple):
    """How well a model does.

    Attributes:
      loss: mean cross-entropy, of tokens or of options.
      scores: by name: `perplexity` of texts, `accuracy` and `f1` of a task with options, `exact
        match` and `f1` of answers.
    """

    loss: float
    scores: dict[str, float]


def merit(evaluation: Evaluation, objective: str | None = None) -> tuple[float, float]:
    """What the better of two evaluations has more of, then less loss.

    That is F1 where F1 is the objective of training, and correct answers elsewhere.
    """
    loss, scores = evaluation
    correct = scores.get("accuracy", scores.get("exact match", 0.0))
    wanted = scores["f1"] if objective == "f1" else correct
    return wanted, -loss if loss == loss else -math.inf


class Problem(Protocol):
    """A kind of data."""

    @property
    def batches(self) -> grain.MapDataset:
        """Batches to train on, without end; each depends on its number alone."""
        ...

    def loss(self, model: Any, batch: Any) -> jax.Array:
        """What training makes small: float32 `()`, a mean."""
        ...

    def weight(self, batch: Any) -> jax.Array:
        """What a batch counts beside others, float32 `()`: the number its loss is a mean of."""
        ...

    def held_out(self, part: Part = "test") -> Iterable[Any]:
        """The batches of a part, by which a model is judged."""
        ...

    def measure(self, model: Any, batch: Any) -> Any:
        """What a held-out batch tells of a model, as arrays."""
        ...

    def evaluation(self, measured: Sequence[Any]) -> Evaluation:
        """Sum up what all batches tell."""
        ...


def text_evaluation(loss: float) -> Evaluation:
    """Of texts: their mean loss, and its exponential, the perplexity."""
    return Evaluation(loss, {"perplexity": math.exp(min(loss, 700))})


def make_judge(
    model: Callable[[Any, Any], Generator], problem: Problem, everywhere: Any = None
) -> Callable[[Any, Any, Iterable[Any]], Evaluation]:
    """Return `judge(trainable, frozen, batches)`, which compiles once for each shape of batch.

    Args:
      model: `(trainable, frozen) -> model`.
      problem: what judges.
      everywhere: the sharding of what is whole on all devices of a mesh, None for one device.
    """

    @partial(jax.jit, out_shardings=everywhere)
    def measure(trainable, frozen, batch):
        return problem.measure(model(trainable, frozen), batch)

    def judge(trainable: Any, frozen: Any, batches: Iterable[Any]) -> Evaluation:
        measured = [measure(trainable, frozen, batch) for batch in batches]
        return problem.evaluation(jax.device_get(measured))

    return judge
