"""From what the user calls a task to its examples."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.llm.errors import UsageError
from examples.llm.tasks.example import Example
from examples.llm.tasks.formats import Format, format_of
from examples.llm.tasks.splits import split

# The files of tasks that have a name, and where they come from.
NAMED_FILES = {
    "polarity": ("sentence_polarity.zip", "nltk.download('sentence_polarity') fetches it"),
    "sms": ("SMSSpamCollection.tsv", "the UCI machine learning repository has it"),
}


@dataclass(frozen=True)
class Task:
    """The worded examples of a task.

    Attributes:
      format: what it was read from.
      train: what methods learn from.
      dev: what hyperparameters are chosen by.
      test: what is reported.
    """

    format: Format
    train: list[Example]
    dev: list[Example]
    test: list[Example]


def task_path(task: str, data: Path, flag: str = "--task") -> Path:
    """Find the file of a task: a name in `NAMED_FILES`, whose file is in `data`, or a path."""
    name, origin = NAMED_FILES.get(task, (None, ""))
    path = Path(task) if name is None else data / name
    if not path.is_file():
        if name is None:
            known = ", ".join(("sotu", *NAMED_FILES))
            raise UsageError(f"{flag}: {task} is neither a file nor one of {known}")
        raise UsageError(f"--data: {task} needs {name}, which is not in {data}; {origin}")
    return path


def load_task(path: Path, sizes: tuple[int, int, int], *, aligned: bool = True) -> Task:
    """Read, split and word the examples in a file.

    Args:
      path: the file; its format is told by its content.
      sizes: of the parts, see `splits.split`.
      aligned: with the template that makes the answer likely text, or the bare one.

    Raises:
      UsageError: it can't be read, or has no bare template.
    """
    format_ = format_of(path)
    template = format_.wording.aligned if aligned else format_.wording.bare
    if template is None:
        raise UsageError(f"--no-template: {format_.name} has no template that could be left out")
    parts = split(list(format_.read(path)), sizes)
    return Task(format_, *([template.example(record) for record in part] for part in parts))


def load_examples(path: Path, count: int) -> list[Example]:
    """Read and word at most `count` examples of a file, of all its parts.

    Raises:
      UsageError: it can't be read, or has none.
    """
    format_ = format_of(path)
    records = list(format_.read(path))
    if not records:
        raise UsageError(f"--judge: {path} has no examples")
    order = np.random.default_rng(0).permutation(len(records))[:count]
    return [format_.wording.aligned.example(records[index]) for index in order]
