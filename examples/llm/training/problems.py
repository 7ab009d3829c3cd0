"""What a run learns: batches, a loss of a model, and how well a model does on held-out data."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from examples.llm.errors import UsageError
from examples.llm.instructions.batches import PairBatches
from examples.llm.instructions.encoding import EncodedText, encode_dialogue
from examples.llm.instructions.formats import Dialogue, Reader, reader_of
from examples.llm.instructions.packing import PackedBatches
from examples.llm.instructions.problem import InstructionProblem
from examples.llm.models.tokenizer import SpecialTokens
from examples.llm.program.settings import Settings
from examples.llm.program.unused_flags import check_used
from examples.llm.tasks.batches import Batches, EncodedExample
from examples.llm.tasks.encoders import ClassProblem, Head, class_reading, masked_reading
from examples.llm.tasks.example import Example
from examples.llm.tasks.files import Row
from examples.llm.tasks.loading import (
    Data,
    Task,
    known_format,
    load_task,
    load_test,
    read_data,
    summary,
)
from examples.llm.tasks.problem import OptionProblem, decoder_reading
from examples.llm.tasks.questions import AnswerProblem, ScoreProblem, encode_question
from examples.llm.tasks.scoring import OBJECTIVES
from examples.llm.tasks.sources import FileSource
from examples.llm.tasks.splits import Splits, fill
from examples.llm.text import (
    TextProblem,
    load_addresses,
    pieces_of,
    texts_of_files,
    windows_of,
)
from examples.llm.training.judging import Problem

# To learn from, of a task, unless the user says how many.
_TASK_EXAMPLES = 1000
# To judge by, of what is learnt, unless the user says how many.
_EVAL_EXAMPLES = 200


def build_problem(
    settings: Settings,
    tokenizer: Tokenizer,
    special: SpecialTokens,
    head: Head | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Problem:
    """Build what `settings` call the task; it is judged by what is not learnt from.

    Args:
      settings: of the run.
      tokenizer: of the model.
      special: of the model.
      head: of an encoder; None for a decoder.
      tell: is given what rows were read as, in words.

    Raises:
      UsageError: the data can't be read, or are not for such a model.
    """
    if settings.task == "sotu":
        texts = load_addresses()
    else:
        source = settings.source()
        if not (isinstance(source, FileSource) and source.is_text):
            data = read_data(source)
            problem, parts = _problem_of_rows(settings, tokenizer, special, head, data)
            name = data.format.name if data.format else "instructions"
            tell(f"{settings.task}, {summary(name, parts)}")
            return problem
        texts = texts_of_files(source)
    if head:
        raise UsageError(f"--task: {settings.task} is text, and an encoder learns from options")
    check_used(settings, "text")
    if settings.pack:
        return _packed_text_problem(settings, tokenizer, special, texts)
    windows = windows_of(tokenizer, texts, settings.sequence_length, settings.seed)
    return TextProblem(*windows, settings.batch_size, settings.eval_batches)


def _problem_of_rows(
    settings: Settings,
    tokenizer: Tokenizer,
    special: SpecialTokens,
    head: Head | None,
    data: Data,
) -> tuple[Problem, Splits[Any]]:
    """What is learnt, and what is in each part."""
    reader = None if data.format else reader_of(data.any_rows)
    if head and (reader or known_format(data).answers):
        raise UsageError(f"--task: {settings.task} has no options, which an encoder learns from")
    if reader:
        check_used(settings, "instructions")
        return _instruction_problem(settings, tokenizer, special, data.rows, reader)
    format_ = known_format(data)
    sizes = _sizes(settings, settings.train_examples or _TASK_EXAMPLES)
    check_used(settings, "answered freely" if format_.answers else "a choice of options")
    if format_.answers:
        problem = _answer_problem(settings, tokenizer, special, data, sizes)
        return problem, problem.parts
    objective = settings.objective or format_.objective
    if settings.accumulate > 1 and OBJECTIVES[objective].weight is None:
        raise UsageError(f"--accumulate: {objective} is of a batch as a whole, so it must be 1")
    problem = option_problem(
        data, sizes, tokenizer, special, head, sequence_length=settings.sequence_length,
        batch_size=settings.batch_size, objective=objective, aligned=settings.template,
        seed=settings.seed,
    )  # fmt: skip
    return problem, problem.parts


def build_judges(
    settings: Settings, tokenizer: Tokenizer, special: SpecialTokens, context_length: int
) -> dict[str, Problem]:
    """Build the other tasks that a decoder is judged by; their prompts may be longer than what is
    learnt."""
    judges = {}
    for name, source in zip(settings.judge, settings.judge_sources(), strict=True):
        data, size = read_data(source), settings.batch_size
        reading = decoder_reading(known_format(data), tokenizer, special, context_length)
        task = load_test(data, settings.eval_examples, reading.template)
        if task.format.answers:
            judge = answer_problem(task, tokenizer, special, context_length, size)
        else:
            parts = _encoded_parts(task, reading.encode, size)
            judge = OptionProblem(*parts, "classification", settings.seed)
        is_alone = sum(Path(other).stem == Path(name).stem for other in settings.judge) == 1
        judges[Path(name).stem if is_alone else name] = judge
    return judges


def _instruction_problem(
    settings: Settings,
    tokenizer: Tokenizer,
    special: SpecialTokens,
    rows: Splits[Row],
    reader: Reader,
) -> tuple[InstructionProblem, Splits[Dialogue]]:
    dialogues = Splits(*([found for row in part for found in reader(row)] for part in rows))
    sizes = _sizes(settings, settings.train_examples or len(dialogues.train))
    parts = fill(dialogues, sizes)
    train, dev, test = (
        _batches(
            settings,
            [encode_dialogue(one, tokenizer, special, settings.sequence_length) for one in part],
        )
        for part in parts
    )
    return InstructionProblem(train, dev, test), parts


def _packed_text_problem(
    settings: Settings, tokenizer: Tokenizer, special: SpecialTokens, texts: Splits[str]
) -> InstructionProblem:
    """All of the texts to train on, and as much of the others as makes so many batches."""
    pieces = Splits(
        *(pieces_of(part, tokenizer, special, settings.sequence_length) for part in texts)
    )
    judged = settings.eval_batches * settings.batch_size
    return InstructionProblem(
        _batches(settings, pieces.train),
        _batches(settings, pieces.dev[:judged]),
        _batches(settings, pieces.test[:judged]),
    )


def _batches(settings: Settings, texts: Sequence[EncodedText]) -> PairBatches | PackedBatches:
    size, alike = settings.batch_size, settings.accumulate
    options = {"seed": settings.seed, "train_on_source": settings.train_on_source}
    if settings.pack:
        return PackedBatches(texts, size, settings.sequence_length, **options)
    return PairBatches(texts, size, alike=alike, **options)


def option_problem(
    data: Data,
    sizes: tuple[int, int, int],
    tokenizer: Tokenizer,
    special: SpecialTokens,
    head: Head | None,
    *,
    sequence_length: int,
    batch_size: int,
    objective: str | None,
    aligned: bool,
    seed: int,
) -> OptionProblem:
    """Learning which option is the right one.

    Args:
      data: of a task with options.
      sizes: examples to train on, make choices by and report, at most.
      tokenizer: of the model.
      special: of the model.
      head: of an encoder; None for a decoder.
      sequence_length: tokens in an example at most.
      batch_size: examples in a batch.
      objective: what is trained on; None for the task's own.
      aligned: with the template that makes the answer likely text, or the bare one.
      seed: chooses the training batches.

    Raises:
      UsageError: they are not for such a model.
    """
    format_ = known_format(data)
    if head == "classes":
        reading = class_reading(format_, tokenizer, sequence_length)
    elif head == "masked-lm":
        if not aligned:
            raise UsageError("--no-template: a mask stands in a template")
        reading = masked_reading(format_, tokenizer, special.mask, sequence_length)
    else:
        reading = decoder_reading(format_, tokenizer, special, sequence_length, aligned=aligned)
    task = load_task(data, sizes, reading.template)
    parts = _encoded_parts(task, reading.encode, batch_size)
    return reading.problem(*parts, objective or format_.objective, seed)


def classes_of(problem: Problem) -> int | None:
    """Return how many classes a layer of the model has to tell apart, if that is the problem."""
    return problem.train.num_options if isinstance(problem, ClassProblem) else None


def _encoded_parts(
    task: Task, encode: Callable[[Example], EncodedExample], batch_size: int
) -> tuple[Batches, Batches, Batches]:
    parts = (task.train, task.dev, task.test)
    subjects = tuple(sorted({example.subject for part in parts for example in part}))
    train, dev, test = (Batches([*map(encode, part)], batch_size, subjects) for part in parts)
    return train, dev, test


def _answer_problem(
    settings: Settings,
    tokenizer: Tokenizer,
    special: SpecialTokens,
    data: Data,
    sizes: tuple[int, int, int],
) -> AnswerProblem:
    length, size = settings.sequence_length, settings.batch_size
    reading = decoder_reading(
        known_format(data), tokenizer, special, length, aligned=settings.template
    )
    task = load_task(data, sizes, reading.template)
    kind, answers = AnswerProblem, task.format.answers
    if answers and settings.objective not in (None, "language-model"):
        score = "exact match" if settings.objective == "accuracy" else settings.objective
        if score not in answers.scores:
            name = task.format.name
            raise UsageError(f"--objective: {name} is answered freely, it has no {score}")
        if settings.pack:
            raise UsageError(f"--pack: {score} is of answers that are written one by one")
        kind = partial(ScoreProblem, score=score)
    window = settings.sequence_length if settings.pack else None
    kind = partial(kind, alike=settings.accumulate, seed=settings.seed, window=window)
    return answer_problem(task, tokenizer, special, length, size, kind)


def answer_problem(
    task: Task,
    tokenizer: Tokenizer,
    special: SpecialTokens,
    max_length: int,
    batch_size: int,
    kind: Callable[..., AnswerProblem] = AnswerProblem,
) -> AnswerProblem:
    """Learning to answer a task freely, and being judged by that."""
    answers = task.format.answers
    assert answers is not None
    count = min(answers.tokens, max_length // 2)
    questions = [
        encode_question(example, tokenizer, special, max_length, count)
        for example in (*task.train, *task.dev, *task.test)
    ]
    numbers = iter(range(len(questions)))
    parts = Splits(*([*islice(numbers, len(part))] for part in (task.train, task.dev, task.test)))
    return kind(questions, parts, answers, tokenizer, special.end, count, batch_size)


def _sizes(settings: Settings, train: int) -> tuple[int, int, int]:
    """How much there may be in each part."""
    most = _EVAL_EXAMPLES if settings.eval_examples is None else settings.eval_examples
    return train, most, most
