"""The files that instructions come in, as their authors publish them.

The formats and wordings are those of the QLoRA paper's program (arXiv 2305.14314, appendix B.3).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.llm.tasks.files import Place, holds_rows, read_rows
from examples.llm.tasks.formats import MMLU_FIELDS, text_key

# Stanford Alpaca's wording, with and without an input.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)


@dataclass(frozen=True)
class Pair:
    """What a model is given, and what it is to write.

    Attributes:
      source: may be empty.
      target: the rest of the text.
    """

    source: str
    target: str

    @property
    def keys(self) -> tuple[str, ...]:
        """Pairs that share one are never split up."""
        return (text_key(self.source or self.target),)


Reader = Callable[[Place, Mapping[str, Any]], Iterator[Pair]]


def reader_of(path: Path) -> Reader | None:
    """Tell how to read the records of a file by the fields of its first; None if it has others."""
    row = next(read_rows(path), None) if holds_rows(path) else None
    if row is None or MMLU_FIELDS <= row.values.keys():
        return None
    for names, reader in _READERS:
        if names <= row.values.keys():
            return reader
    return None


def read_pairs(path: Path, reader: Reader) -> list[Pair]:
    """All instructions of a file.

    Raises:
      UsageError: a record is of another form.
    """
    return [pair for place, row in read_rows(path) for pair in reader(place, row)]


def _alpaca(place: Place, row: Mapping[str, Any]) -> Iterator[Pair]:
    """Alpaca's, and its cleaned form: an instruction, perhaps its input, an output."""
    context = "" if row.get("input") is None else place.field(row, "input")
    yield _worded(place.field(row, "instruction"), context, place.field(row, "output"))


def _seeds(place: Place, row: Mapping[str, Any]) -> Iterator[Pair]:
    """Self-instruct's seed tasks: an instruction and its instances."""
    instruction = place.field(row, "instruction")
    for instance in place.field(row, "instances", list):
        context, output = (place.field(instance, name) for name in ("input", "output"))
        yield _worded(instruction, context, output)


def _self_instruct(place: Place, row: Mapping[str, Any]) -> Iterator[Pair]:
    yield Pair(place.field(row, "prompt"), place.field(row, "completion"))


def _input_output(place: Place, row: Mapping[str, Any]) -> Iterator[Pair]:
    yield Pair(place.field(row, "input"), place.field(row, "output"))


def _chosen(place: Place, row: Mapping[str, Any]) -> Iterator[Pair]:
    """HH-RLHF's: the dialogue that was preferred; all of it is learnt."""
    yield Pair("", place.field(row, "chosen"))


def _text(place: Place, row: Mapping[str, Any]) -> Iterator[Pair]:
    """Chip2's question and answer, or a dialogue as OASST1's, all of which is learnt."""
    text = place.field(row, "text")
    question, bot, answer = text.partition("\n<bot>: ")
    yield Pair(question.removeprefix("<human>: "), answer) if bot else Pair("", text)


def _worded(instruction: str, context: str, output: str) -> Pair:
    template = _WITH_INPUT if context else _WITHOUT_INPUT
    return Pair(template.format(instruction=instruction, input=context), output)


# By the fields of their records, the more particular first.
_READERS: tuple[tuple[frozenset[str], Reader], ...] = (
    (frozenset({"instruction", "instances"}), _seeds),
    (frozenset({"instruction", "output"}), _alpaca),
    (frozenset({"prompt", "completion"}), _self_instruct),
    (frozenset({"input", "output"}), _input_output),
    (frozenset({"chosen"}), _chosen),
    (frozenset({"text"}), _text),
)
