"""What a run learns: batches, a loss of a model, and how well a model does on held-out data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from tokenizers import Tokenizer

from examples.llm.errors import UsageError
from examples.llm.instructions.batches import PairBatches
from examples.llm.instructions.encoding import encode_pair
from examples.llm.instructions.formats import Reader, read_pairs, reader_of
from examples.llm.instructions.problem import InstructionProblem
from examples.llm.models.decoder import LanguageModel
from examples.llm.models.tokenizer import SpecialTokens
from examples.llm.program.settings import Settings
from examples.llm.tasks.batches import Batches, OptionBatch, encode
from examples.llm.tasks.loading import Task, load_examples, load_task, task_path
from examples.llm.tasks.scoring import (
    OBJECTIVES,
    accuracy,
    accuracy_by_subject,
    f1,
    option_scores,
    token_log_likelihoods,
)
from examples.llm.tasks.splits import split
from examples.llm.text import (
    TokenWindows,
    load_addresses,
    parts_of_file,
    train_and_held_out_windows,
)
from examples.llm.training.judging import Evaluation, Problem, text_evaluation
from examples.llm.training.steps import next_token_loss

# To learn from, of a task with options, unless the user says how many.
_OPTION_EXAMPLES = 1000


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

    def batch(self, number: int) -> np.ndarray:
        """int32 `(batch_size, length + 1)`."""
        return self.train.batch(number, self.batch_size)

    def loss(self, model: LanguageModel, batch: jax.Array) -> jax.Array:
        """See `next_token_loss`."""
        return next_token_loss(model, batch)

    def weight(self, batch: jax.Array) -> jax.Array:
        """The number of tokens that are predicted."""
        return jnp.float32(batch.shape[0] * (batch.shape[1] - 1))

    def held_out(self) -> Iterable[np.ndarray]:
        """The same for every run."""
        for index in range(self.eval_batches):
            yield self.held_out_windows.batch(index, self.batch_size)

    def measure(self, model: LanguageModel, batch: jax.Array) -> jax.Array:
        """The loss of a batch."""
        return next_token_loss(model, batch)

    def evaluation(self, measured: Sequence[jax.Array]) -> Evaluation:
        """The mean loss, and its exponential."""
        return text_evaluation(float(np.mean(measured)))


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

    def batch(self, number: int) -> OptionBatch:
        """A batch of random examples."""
        return self.train.random(number, self.seed)

    def loss(self, model: LanguageModel, batch: OptionBatch) -> jax.Array:
        """The objective."""
        return OBJECTIVES[self.objective].loss(token_log_likelihoods(model, batch), batch)

    def weight(self, batch: OptionBatch) -> jax.Array:
        """The number of what the objective is a mean over."""
        weight = OBJECTIVES[self.objective].weight
        assert weight is not None  # else the settings are refused
        return weight(batch)

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
        count = len(self.judged.subjects)
        if count > 1:
            by_subject = accuracy_by_subject(predictions, labels, weights, subjects, count)
            scores["accuracy by subject"] = by_subject
        if self.judged.num_options == 2:
            scores["f1"] = f1(predictions, labels, weights)
        return Evaluation(loss, {name: float(score) for name, score in scores.items()})


def build_problem(settings: Settings, tokenizer: Tokenizer, special: SpecialTokens) -> Problem:
    """Build what `settings` call the task; it is judged by what is not learnt from."""
    if settings.task == "sotu":
        return _text_problem(settings, tokenizer, *load_addresses())
    path = task_path(settings.task, settings.data)
    if path.suffix == ".txt":
        return _text_problem(settings, tokenizer, *parts_of_file(path))
    reader = reader_of(path)
    if reader:
        return _instruction_problem(settings, tokenizer, special, path, reader)
    return _option_problem(settings, tokenizer, special.begin, path)


def build_judges(
    settings: Settings, tokenizer: Tokenizer, begin: int | None, context_length: int
) -> dict[str, OptionProblem]:
    """Build the other tasks that models are judged by; their prompts may be longer than what is
    learnt."""
    judges = {}
    for name in settings.judge:
        examples = load_examples(task_path(name, settings.data), settings.eval_examples)
        encoded = [encode(example, tokenizer, context_length, begin) for example in examples]
        batches = Batches(encoded, settings.batch_size)
        is_alone = sum(Path(other).stem == Path(name).stem for other in settings.judge) == 1
        judges[Path(name).stem if is_alone else name] = OptionProblem(
            batches, batches, "classification", settings.seed
        )
    return judges


def _text_problem(
    settings: Settings, tokenizer: Tokenizer, train: list[str], held_out: list[str]
) -> TextProblem:
    windows = train_and_held_out_windows(
        tokenizer, train, held_out, settings.sequence_length, settings.seed
    )
    return TextProblem(*windows, settings.batch_size, settings.eval_batches)


def _instruction_problem(
    settings: Settings, tokenizer: Tokenizer, special: SpecialTokens, path: Path, reader: Reader
) -> InstructionProblem:
    if settings.objective or not settings.template:
        flag = "--objective" if settings.objective else "--no-template"
        raise UsageError(f"{flag}: {path} has no options")
    pairs = read_pairs(path, reader)
    held_out_size = min(settings.eval_examples, len(pairs) // 2)
    train_size = settings.train_examples or len(pairs)
    train, _, held_out = split(pairs, (train_size, 0, held_out_size))

    def batches(pairs, seed):
        encoded = [
            encode_pair(pair, tokenizer, special, settings.sequence_length) for pair in pairs
        ]
        return PairBatches(
            encoded,
            settings.batch_size,
            alike=settings.accumulate,
            seed=seed,
            train_on_source=settings.train_on_source,
        )

    return InstructionProblem(batches(train, settings.seed), batches(held_out, 0))


def _option_problem(
    settings: Settings, tokenizer: Tokenizer, begin: int | None, path: Path
) -> OptionProblem:
    held_out = settings.eval_examples
    sizes = (settings.train_examples or _OPTION_EXAMPLES, held_out, held_out)
    task = load_task(path, sizes, aligned=settings.template)
    objective = settings.objective or task.format.objective
    if settings.accumulate > 1 and OBJECTIVES[objective].weight is None:
        raise UsageError(f"--accumulate: {objective} is of a batch as a whole, so it must be 1")
    train, _, test = encoded_parts(
        task, tokenizer, begin, settings.sequence_length, settings.batch_size
    )
    return OptionProblem(train, test, objective, settings.seed)


def encoded_parts(
    task: Task, tokenizer: Tokenizer, begin: int | None, max_length: int, batch_size: int
) -> tuple[Batches, Batches, Batches]:
    """Batches of the train, development and test examples of a task."""

    def batches(examples):
        encoded = [encode(example, tokenizer, max_length, begin) for example in examples]
        return Batches(encoded, batch_size)

    return batches(task.train), batches(task.dev), batches(task.test)
