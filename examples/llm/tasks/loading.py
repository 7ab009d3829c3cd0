"""From a source of data to worded examples."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from examples.llm.instructions.encoding import EncodedText
from examples.llm.tasks.batches import EncodedExample
from examples.llm.tasks.example import Example, Template
from examples.llm.tasks.files import Row
from examples.llm.tasks.formats import Format, format_of
from examples.llm.tasks.sources import Source
from examples.llm.tasks.splits import Splits, fill, with_test

_UNKNOWN = (
    "these are not the fields and labels of SST-2 (sentence), polarity (text, with label neg or "
    "pos), sms (sms), COPA (premise, choice1), WinoGrande (sentence, option1), MultiRC or BoolQ "
    "(passage), RTE or CB (premise, hypothesis), SQuAD (context), GSM8K (question, answer), MMLU "
    "(question, choices or input, output, subject) or BBH (input, target); instructions to "
    "fine-tune on have no label, but instruction and output or instances, prompt and completion, "
    "input and output, conversations, messages, chosen, or text"
)


class Data(NamedTuple):
    """What a source holds.

    Attributes:
      format: the task; None if it is none that is known.
      rows: its parts; those that it does not come in are empty.
    """

    format: Format | None
    rows: Splits[Row]

    @property
    def any_rows(self) -> list[Row]:
        """A part that is not empty."""
        return next(part for part in self.rows if part)


@dataclass(frozen=True)
class Task:
    """The worded examples of a task.

    Attributes:
      format: what they were read as.
      train: what methods learn from.
      dev: what hyperparameters are chosen by.
      test: what is reported.
    """

    format: Format
    train: list[Example]
    dev: list[Example]
    test: list[Example]


def read_data(source: Source) -> Data:
    """Read a source.

    A part without labels, as benchmarks have it for the test, is left out; see also `with_test`.

    Raises:
      UsageError: it can't be read.
    """
    rows = source.rows()
    format_ = format_of([row for part in rows for row in part], source.names)
    if format_ is not None:
        labelled = (part if part and format_.is_labelled(part[0]) else [] for part in rows[1:])
        rows = Splits(rows.train, *labelled)
    return Data(format_, with_test(rows, source.dev_is_named))


def summary(
    name: str, parts: Splits[EncodedExample] | Splits[EncodedText], sequence_length: int
) -> str:
    """What data were read as, and how much is in each part, for the user to see."""
    train, dev, test = map(len, parts)
    read = f"read as {name}: {train} to learn from, {dev} to make choices by, {test} held out"
    cut = sum(text.is_cut for part in parts for text in part)
    return f"{read}; {cut} are cut to --sequence-length {sequence_length}" if cut else read


def load_task(data: Data, sizes: tuple[int, int, int], template: Template) -> Task:
    """Deal out and word the examples of a task.

    Args:
      data: what was read.
      sizes: of the parts, see `splits.fill`.
      template: one of the task's.

    Raises:
      UsageError: a row is not what it should be, or there are too few.
    """
    format_ = known_format(data)
    records = Splits(*([format_.record(row) for row in part] for part in data.rows))
    return Task(
        format_, *([template.example(record) for record in part] for part in fill(records, sizes))
    )


def load_test(data: Data, count: int | None, template: Template) -> Task:
    """Word at most `count` examples of a task to be reported, of its test if there is one.

    None is all of them.

    Raises:
      UsageError: a row is not what it should be.
    """
    format_ = known_format(data)
    rows = data.rows.test or data.rows.dev or data.rows.train
    order = np.random.default_rng(0).permutation(len(rows))[:count]
    examples = [template.example(format_.record(rows[index])) for index in order]
    return Task(format_, [], [], examples)


def known_format(data: Data) -> Format:
    """The task that a source holds.

    Raises:
      UsageError: it is none that is known.
    """
    if data.format is None:
        row = data.any_rows[0]
        raise row.place.error(f"{', '.join(row.values)}: {_UNKNOWN}")
    return data.format
