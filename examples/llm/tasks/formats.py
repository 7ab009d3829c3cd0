"""The files that tasks come in, as their authors publish them."""

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.llm.errors import UsageError
from examples.llm.tasks import templates
from examples.llm.tasks.example import Record
from examples.llm.tasks.files import decoded_lines, holds_rows, read_lines, read_rows
from examples.llm.tasks.templates import Wording


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
      name: of the task.
      read: gives the records of a file.
      wording: its templates.
      objective: what is trained on unless the user chooses; a name in `scoring.OBJECTIVES`.
    """

    name: str
    read: Callable[[Path], Iterator[Record]]
    wording: Wording
    objective: str


def format_of(path: Path) -> Format:
    """Tell a file's format by its first line.

    Raises:
      UsageError: it can't be read, is empty, or is of no known format.
    """
    if path.suffix == ".zip":
        return POLARITY
    if holds_rows(path):
        return _format_of_rows(path)
    line = next(read_lines(path), None)
    if line is None:
        raise UsageError(f"--task: {path} is empty")
    columns = line.text.split("\t")
    if "sentence" in columns:
        return SST2
    if len(columns) > 1 and columns[0] in _SMS_LABELS:
        return SMS
    raise line.error("neither the columns of SST-2 (sentence, label), nor an SMS, nor JSON")


def _format_of_rows(path: Path) -> Format:
    row = next(read_rows(path), None)
    if row is None:
        raise UsageError(f"--task: {path} is empty")
    for format_, names in _JSON_FORMATS:
        if names <= row.values.keys():
            return format_
    raise row.place.error(
        "these are not the fields of COPA (premise, choice1), WinoGrande (sentence, option1), "
        "MultiRC (passage) or MMLU (input, output, subject); instructions to fine-tune on have "
        "instruction and output or instances, prompt and completion, input and output, chosen, or "
        "text"
    )


_SMS_LABELS = ("ham", "spam")
_POLARITY_LABELS = ("neg", "pos")


def _polarity(path: Path) -> Iterator[Record]:
    """Pang and Lee's `rt-polarity.neg` and `.pos`, in NLTK's zip: a snippet a line, Latin-1."""
    for label, ending in enumerate(_POLARITY_LABELS):
        try:
            with zipfile.ZipFile(path) as archive:
                (name,) = (n for n in archive.namelist() if n.endswith(f"rt-polarity.{ending}"))
                content = archive.read(name)
        except OSError as error:
            raise UsageError(f"--task: cannot read {path}: {error.strerror}") from error
        except zipfile.BadZipFile as error:
            raise UsageError(f"--task: {path} is no zip file: {error}") from error
        except ValueError as error:
            raise UsageError(f"--task: {path} does not hold one rt-polarity.{ending}") from error
        for line in decoded_lines(path / name, content, "latin-1"):
            yield _text_record(line.text, label)


def _sms(path: Path) -> Iterator[Record]:
    for line in read_lines(path):
        label, tab, text = line.text.partition("\t")
        if not tab:
            raise line.error("there is no tab between label and message")
        yield _text_record(text, line.choice("the label", label, _SMS_LABELS))


def _sst2(path: Path) -> Iterator[Record]:
    """GLUE's `train.tsv` and `dev.tsv`: a header, and no quoting."""
    lines = read_lines(path)
    header = next(lines)
    columns = header.text.split("\t")
    if "label" not in columns:
        raise header.error(f"there is no column label, only {', '.join(columns)}")
    for line in lines:
        values = line.text.split("\t")
        if len(values) != len(columns):
            raise line.error(f"must have {len(columns)} columns, got {len(values)}")
        row = dict(zip(columns, values, strict=True))
        yield _text_record(row["sentence"], line.choice("label", row["label"], ("0", "1")))


def _copa(path: Path) -> Iterator[Record]:
    """SuperGLUE's: which of two is the cause, or the effect, of a premise."""
    for line, row in read_rows(path):
        premise, *choices = (line.field(row, name) for name in ("premise", "choice1", "choice2"))
        question = line.choice("question", line.field(row, "question"), ("cause", "effect"))
        fields = {
            "premise": premise.strip(),
            "clause": premise.strip().removesuffix("."),
            "conjunction": ("because", "so")[question],
        }
        for number, choice in enumerate(choices, 1):
            fields[f"choice{number}"] = choice.strip()
            fields[f"continuation{number}"] = _mid_sentence(choice.strip())
        label = line.choice("label", line.field(row, "label", int), (0, 1))
        yield Record(fields, label, (text_key(premise),))


def _winogrande(path: Path) -> Iterator[Record]:
    """A sentence with a gap; `qID`s of twin sentences differ after the last hyphen."""
    for line, row in read_rows(path):
        sentence = line.field(row, "sentence")
        if sentence.count("_") != 1:
            raise line.error(f"sentence must have one gap _, got {sentence!r}")
        before, after = sentence.split("_")
        fields = {
            "before": before.rstrip(),
            "space": before[len(before.rstrip()) :],
            "after": after,
            "option1": line.field(row, "option1"),
            "option2": line.field(row, "option2"),
        }
        label = line.choice("answer", line.field(row, "answer"), ("1", "2"))
        keys = (text_key(sentence),)
        if "qID" in row:
            keys += (line.field(row, "qID").rpartition("-")[0] or row["qID"],)
        yield Record(fields, label, keys)


def _multirc(path: Path) -> Iterator[Record]:
    """SuperGLUE's: is this an answer to this question on this passage? All of one passage agree."""
    for line, row in read_rows(path):
        passage = line.field(row, "passage", dict)
        text = line.field(passage, "text")
        for question in line.field(passage, "questions", list):
            for answer in line.field(question, "answers", list):
                fields = {
                    "passage": text.strip(),
                    "question": line.field(question, "question").strip(),
                    "answer": line.field(answer, "text").strip(),
                }
                label = line.choice("label", line.field(answer, "label", int), (0, 1))
                yield Record(fields, label, (text_key(text),))


def _mmlu(path: Path) -> Iterator[Record]:
    """Questions with a letter for an answer, solved ones before them, as the QLoRA paper has it."""
    for place, row in read_rows(path):
        text = place.field(row, "input")
        label = place.choice("output", place.field(row, "output").strip(), ("A", "B", "C", "D"))
        fields = {"text": text.rstrip()}
        yield Record(fields, label, (text_key(text),), place.field(row, "subject"))


def text_key(text: str) -> str:
    """The same for texts that differ in nothing but case and space."""
    return " ".join(text.casefold().split())


def _text_record(text: str, label: int) -> Record:
    return Record({"text": text.strip()}, label, (text_key(text),))


def _mid_sentence(text: str) -> str:
    is_pronoun = text.split(maxsplit=1)[:1] == ["I"] or text.startswith("I'")
    return text if is_pronoun else text[:1].lower() + text[1:]


POLARITY = Format("polarity", _polarity, templates.SENTIMENT, "classification")
SMS = Format("sms", _sms, templates.SPAM, "classification")
SST2 = Format("sst2", _sst2, templates.SENTIMENT, "classification")
COPA = Format("copa", _copa, templates.COPA, "language-model")
WINOGRANDE = Format("winogrande", _winogrande, templates.WINOGRANDE, "language-model")
MULTIRC = Format("multirc", _multirc, templates.MULTIRC, "classification")

MMLU = Format("mmlu", _mmlu, templates.LETTERS, "classification")
MMLU_FIELDS = frozenset({"input", "output", "subject"})

# Told apart by the fields of their records.
_JSON_FORMATS: tuple[tuple[Format, frozenset[str]], ...] = (
    (COPA, frozenset({"premise", "choice1"})),
    (WINOGRANDE, frozenset({"sentence", "option1"})),
    (MULTIRC, frozenset({"passage"})),
    (MMLU, MMLU_FIELDS),
)
