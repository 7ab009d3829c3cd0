"""Questions that are answered freely: as tokens, and learning to answer them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from examples.llm.instructions.batches import PairBatch, PairBatches, batch_of, in_order, room
from examples.llm.instructions.encoding import EncodedText, encode_dialogue
from examples.llm.instructions.formats import one
from examples.llm.instructions.packing import PackedBatches
from examples.llm.instructions.problem import summed_loss
from examples.llm.models.decoder import Generator
from examples.llm.models.generation import generate
from examples.llm.models.tokenizer import SpecialTokens, plain_tokens
from examples.llm.sampling import of_like_length
from examples.llm.tasks.answers import Answers
from examples.llm.tasks.example import Example
from examples.llm.tasks.splits import Splits
from examples.llm.training.judging import Evaluation, Part

# NumPy's where a batch is made, JAX's where it is traced.
Array = Any


@dataclass(frozen=True)
class Question:
    """A question in tokens.

    Attributes:
      prompt: at least one.
      text: with what is to be learnt.
      answers: texts that are right.
    """

    prompt: tuple[int, ...]
    text: EncodedText
    answers: tuple[str, ...]


class QuestionBatch(NamedTuple):
    """Questions, to be answered.

    Attributes:
      texts: with what is to be learnt.
      prompts: int32 `(batch, length)`.
      lengths: int32 `(batch,)`: tokens of each prompt; what is after them is padding.
      numbers: int32 `(batch,)`: which question it is; -1 for none, which fills the batch up.
    """

    texts: PairBatch
    prompts: Array
    lengths: Array
    numbers: Array


def encode_question(
    example: Example, tokenizer: Tokenizer, special: SpecialTokens, max_length: int, count: int
) -> Question:
    """Turn an example into tokens; a prompt that is too long loses its beginning.

    Args:
      example: whose only option is what is to be learnt.
      tokenizer: of the model.
      special: of the model.
      max_length: tokens that the model reads at most.
      count: how many of them are left for an answer.
    """
    (target,) = example.options
    text = encode_dialogue(one(example.prompt, target), tokenizer, special, max_length)
    room = max_length - count - len(special.front)
    prompt = plain_tokens(tokenizer, example.prompt)[-room:]
    return Question((*special.front, *prompt) or (0,), text, example.answers)


@dataclass(frozen=True)
class AnswerProblem:
    """Answers are learnt token by token; models are judged by those that they write.

    Attributes:
      questions: of all parts.
      parts: the numbers of those to learn from, to choose by and to report.
      answers: how an answer is judged.
      tokenizer: of the model.
      end: the model's token for an end; None for none.
      count: tokens of an answer at most.
      batch_size: questions in a batch.
      alike: so many batches in a row have one shape.
      seed: chooses the training batches.
      window: tokens of the windows in which several texts to learn from are put; None: in none.
    """

    questions: Sequence[Question]
    parts: Splits[int]
    answers: Answers
    tokenizer: Tokenizer
    end: int | None
    count: int
    batch_size: int
    alike: int = 1
    seed: int = 0
    window: int | None = None

    @property
    def batches(self) -> grain.MapDataset:
        """Random texts of like length, or windows of several."""
        return self._learnt.random

    def loss(self, model: Generator, batch: PairBatch) -> jax.Array:
        """The mean over the tokens of answers."""
        return summed_loss(model, batch) / self.weight(batch)

    def weight(self, batch: PairBatch) -> jax.Array:
        """The number of these tokens."""
        return jnp.sum(batch.weights)

    def held_out(self, part: Part = "test") -> Iterable[QuestionBatch]:
        """All questions of a part."""
        numbers = np.array(self.parts.dev if part == "dev" else self.parts.test)
        for chosen in in_order(self._lengths[numbers], self.batch_size):
            yield self._batch(numbers[chosen], numbers[chosen])

    def measure(self, model: Generator, batch: QuestionBatch) -> dict[str, jax.Array]:
        """Summed loss, the number of its tokens, and what the model writes."""
        return {
            "loss": summed_loss(model, batch.texts),
            "tokens": jnp.sum(batch.texts.weights),
            "written": self._written(model, batch),
            "numbers": batch.numbers,
        }

    def evaluation(self, measured: Sequence[dict[str, jax.Array]]) -> Evaluation:
        """The mean loss over tokens, and the means of the scores over questions."""
        loss = sum(float(batch["loss"]) for batch in measured)
        tokens = sum(float(batch["tokens"]) for batch in measured)
        found = [
            judged
            for batch in measured
            for judged in self._judged(batch["written"], batch["numbers"])
        ]
        means = {name: float(np.mean([one[name] for one in found])) for name in self.answers.scores}
        return Evaluation(loss / tokens, means)

    def _written(self, model: Generator, batch: QuestionBatch) -> jax.Array:
        return generate(model, batch.prompts, batch.lengths, count=self.count, end=self.end)

    def _judged(self, written: Array, numbers: Array) -> list[dict[str, float]]:
        """The scores of each answer; of what fills a batch up there are none."""
        return [
            self.answers.judged(self._text(tokens), self.questions[number].answers)
            for tokens, number in zip(np.asarray(written).tolist(), np.asarray(numbers).tolist())
            if number >= 0
        ]

    def _text(self, tokens: list[int]) -> str:
        if self.end in tokens:
            tokens = tokens[: tokens.index(self.end)]
        return self.tokenizer.decode(tokens)

    def _batch(self, numbers: np.ndarray, alike: np.ndarray) -> QuestionBatch:
        """Questions, padded as much as all those that are to have the same shape."""
        questions = [self.questions[number] for number in numbers]
        prompts = np.zeros((self.batch_size, room(self._lengths, alike)), np.int32)
        lengths = np.ones(self.batch_size, np.int32)
        for row, question in enumerate(questions):
            prompts[row, : len(question.prompt)] = question.prompt
            lengths[row] = len(question.prompt)
        filled_up = np.pad(numbers, (0, self.batch_size - len(numbers)), constant_values=-1)
        rows, length = [[question.text] for question in questions], room(self._text_lengths, alike)
        texts = batch_of(rows, self.batch_size, length)
        return QuestionBatch(texts, prompts, lengths, filled_up.astype(np.int32))

    @cached_property
    def _learnt(self) -> PairBatches | PackedBatches:
        texts = [self.questions[number].text for number in self.parts.train]
        if self.window is not None:
            return PackedBatches(texts, self.batch_size, self.window, seed=self.seed)
        return PairBatches(texts, self.batch_size, alike=self.alike, seed=self.seed)

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(question.prompt) for question in self.questions])

    @cached_property
    def _text_lengths(self) -> np.ndarray:
        return np.array([len(question.text.tokens) - 1 for question in self.questions])


@dataclass(frozen=True)
class ScoreProblem(AnswerProblem):
    """What training makes small is one less a score of the answers, which has no gradient.

    Attributes:
      score: its name.
    """

    score: str = ""

    @property
    def batches(self) -> grain.MapDataset:
        """Random questions of like length."""
        numbers = np.array(self.parts.train)
        groups = of_like_length(
            self._lengths[numbers], self.batch_size, self.seed, alike=self.alike
        )
        return groups.map(lambda group: self._batch(numbers[group.texts], numbers[group.alike]))

    def loss(self, model: Generator, batch: QuestionBatch) -> jax.Array:
        """One less the mean score."""

        def scores(written: jax.Array, numbers: jax.Array) -> np.ndarray:
            judged = self._judged(written, numbers)
            return np.array([found[self.score] for found in judged], np.float32)

        shape = jax.ShapeDtypeStruct(batch.numbers.shape, jnp.float32)
        written = self._written(model, batch)
        found = jax.pure_callback(scores, shape, written, batch.numbers, vmap_method="sequential")
        return 1 - jnp.mean(found)

    def weight(self, batch: QuestionBatch) -> jax.Array:
        """The number of questions."""
        return jnp.float32(len(batch.numbers))
