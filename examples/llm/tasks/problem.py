"""Learning which option is the right one."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import jax.numpy as jnp
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from tokenizers import Tokenizer

from examples.llm.errors import UsageError
from examples.llm.models.tokenizer import SpecialTokens
from examples.llm.tasks.batches import Batches, EncodedExample, OptionBatch, encode
from examples.llm.tasks.example import Example, Template
from examples.llm.tasks.formats import Format
from examples.llm.tasks.scoring import (
    OBJECTIVES,
    accuracy,
    accuracy_by_subject,
    f1,
    option_scores,
    token_log_likelihoods,
)
from examples.llm.tasks.splits import Splits
from examples.llm.training.judging import Evaluation, Part


@dataclass(frozen=True)
class OptionProblem:
    """The right one of several options.

    Attributes:
      train: examples to learn from.
      dev: examples that choices are made by.
      test: examples that are reported.
      objective: what is trained on; a name in `OBJECTIVES`.
      seed: chooses the training batches.
      offsets: one for each option, taken away from its score where a model is judged; none if
        empty.
    """

    train: Batches
    dev: Batches
    test: Batches
    objective: str
    seed: int
    offsets: tuple[float, ...] = ()

    @property
    def parts(self) -> Splits[EncodedExample]:
        """The examples of each part."""
        return Splits(*([*part.examples] for part in (self.train, self.dev, self.test)))

    @property
    def batches(self) -> grain.MapDataset:
        """Random examples."""
        return self.train.random(self.seed)

    def log_likelihoods(self, model: Any, batch: OptionBatch) -> jax.Array:
        """See `token_log_likelihoods`."""
        return token_log_likelihoods(model, batch)

    def loss(self, model: Any, batch: OptionBatch) -> jax.Array:
        """The objective."""
        return OBJECTIVES[self.objective].loss(self.log_likelihoods(model, batch), batch)

    def weight(self, batch: OptionBatch) -> jax.Array:
        """The number of what the objective is a mean over."""
        weight = OBJECTIVES[self.objective].weight
        assert weight is not None  # else the settings are refused
        return weight(batch)

    def held_out(self, part: Part = "test") -> Iterable[OptionBatch]:
        """All examples of a part."""
        return (self.dev if part == "dev" else self.test).all()

    def measure(self, model: Any, batch: OptionBatch) -> dict[str, jax.Array]:
        """Summed loss, and the prediction, label and weight of each example."""
        scores = option_scores(self.log_likelihoods(model, batch), batch.mask)
        if self.offsets:
            scores -= jnp.array(self.offsets, jnp.float32)[None, :]
        return {
            "loss": jnp.sum(batch.weights * cross_entropy(scores, batch.labels)),
            "predictions": jnp.argmax(scores, axis=-1).astype(jnp.int32),
            "labels": batch.labels,
            "weights": batch.weights,
            "subjects": batch.subjects,
        }

    def evaluation(self, measured: Sequence[dict[str, jax.Array]]) -> Evaluation:
        """Cross-entropy and scores over all examples."""
        predictions, labels, weights, subjects = (
            jnp.concatenate([batch[name] for batch in measured])
            for name in ("predictions", "labels", "weights", "subjects")
        )
        loss = sum(float(batch["loss"]) for batch in measured) / float(jnp.sum(weights))
        scores = {"accuracy": accuracy(predictions, labels, weights)}
        if len(jnp.unique(subjects[weights > 0])) > 1:
            count = len(self.test.subjects)
            by_subject = accuracy_by_subject(predictions, labels, weights, subjects, count)
            scores["accuracy by subject"] = by_subject
        if self.test.num_options == 2:
            scores["f1"] = f1(predictions, labels, weights)
        return Evaluation(loss, {name: float(score) for name, score in scores.items()})


@dataclass(frozen=True)
class Reading:
    """How a model reads a task with options.

    Attributes:
      template: the wording.
      encode: makes tokens of an example.
      problem: what is learnt.
    """

    template: Template
    encode: Callable[[Example], EncodedExample]
    problem: type[OptionProblem]


def decoder_reading(
    format_: Format,
    tokenizer: Tokenizer,
    special: SpecialTokens,
    max_length: int,
    *,
    aligned: bool = True,
) -> Reading:
    """How a model reads a task that it goes on with.

    Args:
      format_: the task.
      tokenizer: of the model.
      special: of the model.
      max_length: see `encode`.
      aligned: with the template that makes the answer likely text, or the bare one.

    Raises:
      UsageError: there is no bare one.
    """
    template = format_.wording.aligned if aligned else format_.wording.bare
    if template is None:
        raise UsageError(f"--no-template: {format_.name} has no template that could be left out")
    return Reading(
        template, lambda example: encode(example, tokenizer, special, max_length), OptionProblem
    )
