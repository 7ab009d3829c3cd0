"""What a run learns: batches, a loss of a model, and how well a model does on held-out data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from examples.llm.errors import UsageError
from examples.llm.instructions.batches import PairBatches
from examples.llm.instructions.encoding import encode_dialogue
from examples.llm.instructions.formats import Reader, reader_of
from examples.llm.instructions.problem import InstructionProblem
from examples.llm.models.decoder import LanguageModel
from examples.llm.models.tokenizer import SpecialTokens
from examples.llm.program.settings import Settings
from examples.llm.tasks.batches import Batches, encode
from examples.llm.tasks.example import Example
from examples.llm.tasks.files import Row
from examples.llm.tasks.loading import Task, known_format, load_examples, load_task, read_data
from examples.llm.tasks.problem import OptionProblem
from examples.llm.tasks.questions import AnswerProblem, ScoreProblem, encode_question
from examples.llm.tasks.scoring import OBJECTIVES
from examples.llm.tasks.sources import FileSource
from examples.llm.tasks.splits import Splits, fill
from examples.llm.text import TokenWindows, load_addresses, texts_of_files, windows_of
from examples.llm.training.judging import Evaluation, Part, Problem, text_evaluation
from examples.llm.training.steps import next_token_loss

# To learn from, of a task with options, unless the user says how many.
_OPTION_EXAMPLES = 1000


@dataclass(frozen=True)
class TextProblem:
    """The next token of texts.

    Attributes:
      train: windows to learn from.
      dev: windows that choices are made by.
      test: windows that are reported.
      batch_size: windows in a batch.
      eval_batches: batches to judge by.
    """

    train: TokenWindows
    dev: TokenWindows
    test: TokenWindows
    batch_size: int
    eval_batches: int

    @property
    def batches(self) -> grain.MapDataset:
        """int32 `(batch_size, length + 1)`."""
        return self.train.batches(self.batch_size)

    def loss(self, model: LanguageModel, batch: jax.Array) -> jax.Array:
        """See `next_token_loss`."""
        return next_token_loss(model, batch)

    def weight(self, batch: jax.Array) -> jax.Array:
        """The number of tokens that are predicted."""
        return jnp.float32(batch.shape[0] * (batch.shape[1] - 1))

    def held_out(self, part: Part = "test") -> Iterable[Any]:
        """The same for every run."""
        batches = (self.dev if part == "dev" else self.test).batches(self.batch_size)
        return (batches[number] for number in range(self.eval_batches))

    def measure(self, model: LanguageModel, batch: jax.Array) -> jax.Array:
        """The loss of a batch."""
        return next_token_loss(model, batch)

    def evaluation(self, measured: Sequence[jax.Array]) -> Evaluation:
        """The mean loss, and its exponential."""
        return text_evaluation(float(np.mean(measured)))


def build_problem(settings: Settings, tokenizer: Tokenizer, special: SpecialTokens) -> Problem:
    """Build what `settings` call the task; it is judged by what is not learnt from."""
    if settings.task == "sotu":
        return _text_problem(settings, tokenizer, load_addresses())
    source = settings.source()
    if isinstance(source, FileSource) and source.is_text:
        return _text_problem(settings, tokenizer, texts_of_files(source))
    data = read_data(source)
    reader = None if data.format else reader_of(data.any_rows)
    if reader:
        return _instruction_problem(settings, tokenizer, special, data.rows, reader)
    sizes = _sizes(settings, data.rows, settings.train_examples or _OPTION_EXAMPLES)
    task = load_task(data, sizes, aligned=settings.template)
    if task.format.answers:
        return _answer_problem(settings, tokenizer, special, task)
    return _option_problem(settings, tokenizer, special.begin, task)


def build_judges(
    settings: Settings, tokenizer: Tokenizer, special: SpecialTokens, context_length: int
) -> dict[str, Problem]:
    """Build the other tasks that models are judged by; their prompts may be longer than what is
    learnt."""
    judges = {}
    for name, source in zip(settings.judge, settings.judge_sources(), strict=True):
        data = read_data(source)
        task = Task(known_format(data), [], [], load_examples(data, settings.eval_examples))
        is_alone = sum(Path(other).stem == Path(name).stem for other in settings.judge) == 1
        if task.format.answers:
            judge = answer_problem(task, tokenizer, special, context_length, settings.batch_size)
        else:
            parts = encoded_parts(
                task, tokenizer, special.begin, context_length, settings.batch_size
            )
            judge = OptionProblem(*parts, "classification", settings.seed)
        judges[Path(name).stem if is_alone else name] = judge
    return judges


def _text_problem(settings: Settings, tokenizer: Tokenizer, texts: Splits[str]) -> TextProblem:
    windows = windows_of(tokenizer, texts, settings.sequence_length, settings.seed)
    return TextProblem(*windows, settings.batch_size, settings.eval_batches)


def _instruction_problem(
    settings: Settings,
    tokenizer: Tokenizer,
    special: SpecialTokens,
    rows: Splits[Row],
    reader: Reader,
) -> InstructionProblem:
    if settings.objective or not settings.template:
        flag = "--objective" if settings.objective else "--no-template"
        raise UsageError(f"{flag}: {settings.task} has no options")
    dialogues = Splits(*([found for row in part for found in reader(row)] for part in rows))
    sizes = _sizes(settings, dialogues, settings.train_examples or len(dialogues.train))
    train, dev, test = (
        PairBatches(
            [encode_dialogue(one, tokenizer, special, settings.sequence_length) for one in part],
            settings.batch_size,
            alike=settings.accumulate,
            seed=settings.seed,
            train_on_source=settings.train_on_source,
        )
        for part in fill(dialogues, sizes)
    )
    return InstructionProblem(train, dev, test)


def _option_problem(
    settings: Settings, tokenizer: Tokenizer, begin: int | None, task: Task
) -> OptionProblem:
    objective = settings.objective or task.format.objective
    if settings.accumulate > 1 and OBJECTIVES[objective].weight is None:
        raise UsageError(f"--accumulate: {objective} is of a batch as a whole, so it must be 1")
    parts = encoded_parts(task, tokenizer, begin, settings.sequence_length, settings.batch_size)
    return OptionProblem(*parts, objective, settings.seed)


def encoded_parts(
    task: Task, tokenizer: Tokenizer, begin: int | None, max_length: int, batch_size: int
) -> tuple[Batches, Batches, Batches]:
    """Batches of the train, development and test examples of a task."""

    def batches(examples: Sequence[Example]) -> Batches:
        encoded = [encode(example, tokenizer, max_length, begin) for example in examples]
        return Batches(encoded, batch_size)

    return batches(task.train), batches(task.dev), batches(task.test)


def _answer_problem(
    settings: Settings, tokenizer: Tokenizer, special: SpecialTokens, task: Task
) -> AnswerProblem:
    problem = answer_problem(
        task, tokenizer, special, settings.sequence_length, settings.batch_size
    )
    problem = replace(problem, alike=settings.accumulate, seed=settings.seed)
    if settings.objective in (None, "language-model"):
        return problem
    score = "exact match" if settings.objective == "accuracy" else settings.objective
    if score not in problem.answers.scores:
        raise UsageError(f"--objective: {task.format.name} is answered freely, it has no {score}")
    return ScoreProblem(**vars(problem), score=score)


def answer_problem(
    task: Task, tokenizer: Tokenizer, special: SpecialTokens, max_length: int, batch_size: int
) -> AnswerProblem:
    """Learning to answer a task freely, and being judged by that."""
    assert task.format.answers is not None
    count = min(task.format.answers.tokens, max_length // 2)
    questions = [
        encode_question(example, tokenizer, special, max_length, count)
        for example in (*task.train, *task.dev, *task.test)
    ]
    numbers = iter(range(len(questions)))
    parts = Splits(*([*islice(numbers, len(part))] for part in (task.train, task.dev, task.test)))
    return AnswerProblem(
        questions, parts, task.format.answers, tokenizer, special.end, count, batch_size
    )


def _sizes(settings: Settings, parts: Splits[Any], train: int) -> tuple[int, int, int]:
    """How much there may be in each part; of what is dealt out, a quarter for each of two."""
    most, quarter = settings.eval_examples, max(len(parts.train) // 4, 1)
    dev, test = (most if part else min(most, quarter) for part in parts[1:])
    return train, dev, test
