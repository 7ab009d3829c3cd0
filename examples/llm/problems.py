"""What a run learns: batches, a loss of a model, and how well a model does on held-out data."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from tokenizers import Tokenizer

from examples.llm.decoder import LanguageModel
from examples.llm.settings import Settings
from examples.llm.tasks.batches import Batches, OptionBatch, encode
from examples.llm.tasks.loading import Task, load_task, task_path
from examples.llm.tasks.scoring import (
    OBJECTIVES,
    accuracy,
    f1,
    option_scores,
    token_log_likelihoods,
)
from examples.llm.text import TokenWindows, train_and_held_out_windows
from examples.llm.training import next_token_loss


class Evaluation(NamedTuple):
    """How well a model does.

    Attributes:
      loss: mean cross-entropy, of tokens or of options.
      scores: by name: `accuracy` and `f1` of a task with options.
    """

    loss: float
    scores: dict[str, float]


class Problem(Protocol):
    """A kind of data."""

    def batch(self, step: int) -> Any:
        """The batch of a training step, which depends on its number alone."""
        ...

    def loss(self, model: LanguageModel, batch: Any) -> jax.Array:
        """What training makes small: float32 `()`."""
        ...

    def held_out(self) -> Iterable[Any]:
        """The batches that a model is judged by."""
        ...

    def measure(self, model: LanguageModel, batch: Any) -> Any:
        """What a held-out batch tells of a model, as arrays."""
        ...

    def evaluation(self, measured: Sequence[Any]) -> Evaluation:
        """Sum up what all batches tell."""
        ...


@dataclass(frozen=True)
class TextProblem:
    """The next token of texts.

    Attributes:
      train: windows to learn from.
      held_out_windows: windows to judge by.
      batch_size: windows in a batch.
      eval_batches: batches to judge by.
    """

    train: TokenWindows
    held_out_windows: TokenWindows
    batch_size: int
    eval_batches: int

    def batch(self, step: int) -> np.ndarray:
        """int32 `(batch_size, length + 1)`."""
        return self.train.batch(step, self.batch_size)

    def loss(self, model: LanguageModel, batch: jax.Array) -> jax.Array:
        """See `next_token_loss`."""
        return next_token_loss(model, batch)

    def held_out(self) -> Iterable[np.ndarray]:
        """The same for every run."""
        for index in range(self.eval_batches):
            yield self.held_out_windows.batch(index, self.batch_size)

    def measure(self, model: LanguageModel, batch: jax.Array) -> jax.Array:
        """The loss of a batch."""
        return next_token_loss(model, batch)

    def evaluation(self, measured: Sequence[jax.Array]) -> Evaluation:
        """The mean loss."""
        return Evaluation(float(np.mean(measured)), {})


@dataclass(frozen=True)
class OptionProblem:
    """The right one of several options.

    Attributes:
      train: examples to learn from.
      judged: examples to judge by.
      objective: what is trained on; a name in `OBJECTIVES`.
      seed: chooses the training batches.
      offsets: one for each option, taken away from its score where a model is judged; none if
        empty.
    """

    train: Batches
    judged: Batches
    objective: str
    seed: int
    offsets: tuple[float, ...] = ()

    def batch(self, step: int) -> OptionBatch:
        """A batch of random examples."""
        return self.train.random(step, self.seed)

    def loss(self, model: LanguageModel, batch: OptionBatch) -> jax.Array:
        """The objective."""
        return OBJECTIVES[self.objective].loss(token_log_likelihoods(model, batch), batch)

    def held_out(self) -> Iterable[OptionBatch]:
        """All examples to judge by."""
        return self.judged.all()

    def measure(self, model: LanguageModel, batch: OptionBatch) -> dict[str, jax.Array]:
        """Summed loss, and the prediction, label and weight of each example."""
        scores = option_scores(token_log_likelihoods(model, batch), batch.mask)
        if self.offsets:
            scores -= jnp.array(self.offsets, jnp.float32)[None, :]
        return {
            "loss": jnp.sum(batch.weights * cross_entropy(scores, batch.labels)),
            "predictions": jnp.argmax(scores, axis=-1).astype(jnp.int32),
            "labels": batch.labels,
            "weights": batch.weights,
        }

    def evaluation(self, measured: Sequence[dict[str, jax.Array]]) -> Evaluation:
        """Cross-entropy, accuracy and F1 over all examples."""
        predictions, labels, weights = (
            jnp.concatenate([batch[name] for batch in measured])
            for name in ("predictions", "labels", "weights")
        )
        loss = sum(float(batch["loss"]) for batch in measured) / float(jnp.sum(weights))
        scores = {"accuracy": accuracy, "f1": f1}
        return Evaluation(
            loss,
            {name: float(score(predictions, labels, weights)) for name, score in scores.items()},
        )


def make_judge(
    model: Callable[[Any, Any], LanguageModel], problem: Problem
) -> Callable[[Any, Any, Iterable[Any]], Evaluation]:
    """Return `judge(trainable, frozen, batches)`, which compiles once for each shape of batch."""

    @jax.jit
    def measure(trainable, frozen, batch):
        return problem.measure(model(trainable, frozen), batch)

    def judge(trainable: Any, frozen: Any, batches: Iterable[Any]) -> Evaluation:
        return problem.evaluation([measure(trainable, frozen, batch) for batch in batches])

    return judge


def build_problem(settings: Settings, tokenizer: Tokenizer) -> Problem:
    """Build what `settings` call the task; it is judged by its test examples."""
    if settings.task == "sotu":
        train, held_out = train_and_held_out_windows(
            tokenizer, settings.sequence_length, settings.seed
        )
        return TextProblem(train, held_out, settings.batch_size, settings.eval_batches)
    sizes = (settings.train_examples, settings.eval_examples, settings.eval_examples)
    path = task_path(settings.task, settings.data)
    task = load_task(path, sizes, aligned=settings.template)
    train, _, test = encoded_parts(task, tokenizer, settings.sequence_length, settings.batch_size)
    return OptionProblem(train, test, settings.objective or task.format.objective, settings.seed)


def encoded_parts(
    task: Task, tokenizer: Tokenizer, max_length: int, batch_size: int
) -> tuple[Batches, Batches, Batches]:
    """Batches of the train, development and test examples of a task."""

    def batches(examples):
        encoded = [encode(example, tokenizer, max_length) for example in examples]
        return Batches(encoded, batch_size)

    return batches(task.train), batches(task.dev), batches(task.test)
