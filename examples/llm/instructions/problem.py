"""Learning to answer instructions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grain
import jax
import jax.numpy as jnp
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from examples.llm.instructions.batches import PairBatch, PairBatches
from examples.llm.instructions.packing import PackedBatches
from examples.llm.models.decoder import LanguageModel
from examples.llm.training.judging import Evaluation, Part, text_evaluation


@dataclass(frozen=True)
class InstructionProblem:
    """The tokens of answers, given those before them.

    Attributes:
      train: texts to learn from.
      dev: texts that choices are made by.
      test: texts that are reported.
    """

    train: PairBatches | PackedBatches
    dev: PairBatches | PackedBatches
    test: PairBatches | PackedBatches

    @property
    def batches(self) -> grain.MapDataset:
        """Random texts of like length, or windows of several."""
        return self.train.random

    def loss(self, model: LanguageModel, batch: PairBatch) -> jax.Array:
        """The mean over the tokens that are to be predicted."""
        return summed_loss(model, batch) / self.weight(batch)

    def weight(self, batch: PairBatch) -> jax.Array:
        """The number of these tokens."""
        return jnp.sum(batch.weights)

    def held_out(self, part: Part = "test") -> Iterable[PairBatch]:
        """All texts of a part."""
        return (self.dev if part == "dev" else self.test).all()

    def measure(self, model: LanguageModel, batch: PairBatch) -> tuple[jax.Array, jax.Array]:
        """The summed loss, and the number of its tokens."""
        return summed_loss(model, batch), self.weight(batch)

    def evaluation(self, measured: Sequence[tuple[jax.Array, jax.Array]]) -> Evaluation:
        """The mean loss over all tokens, and its exponential."""
        losses, counts = zip(*measured, strict=True)
        loss = sum(map(float, losses)) / sum(map(float, counts))
        return text_evaluation(loss)


def summed_loss(model: LanguageModel, batch: PairBatch) -> jax.Array:
    """The cross-entropy of the tokens that are to be predicted, float32 `()`."""
    logits = model.logits(model.features(batch.tokens[:, :-1], batch.segments))
    return jnp.sum(batch.weights * cross_entropy(logits, batch.tokens[:, 1:]))
