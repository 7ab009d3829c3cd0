"""The files of tasks as their authors publish them, made rows of one kind.

Tables without a header get one; what is nested, as questions in their passage are, is made flat.
The names of fields are those that the same data have on the Hugging Face hub, so that a task is
told by its fields wherever it comes from.
"""

import itertools
import zipfile
from collections.abc import Iterator

from examples.llm.errors import UsageError
from examples.llm.tasks.files import (
    File,
    Place,
    Row,
    csv_cells,
    decoded_lines,
    is_json,
    json_rows,
    named_cells,
    tsv_cells,
)

SMS_LABELS = ("ham", "spam")
POLARITY_LABELS = ("neg", "pos")
LETTERS = ("A", "B", "C", "D")
# A file of MMLU is called by its subject and its part.
_MMLU_PARTS = ("_train", "_dev", "_val", "_test")


def read_rows(file: File) -> list[Row]:
    """The rows of a file: `.zip` is the polarity of sentences, `.csv` or JSON what it says.

    Anything else has columns between tabs.

    Raises:
      UsageError: it can't be read, or is something else, or has no row.
    """
    suffix = file.path.suffix.lower()
    if suffix == ".zip":
        rows = _polarity(file)
    elif suffix == ".csv":
        rows = _csv_rows(file)
    elif is_json(file):
        rows = (flat for row in json_rows(file) for flat in _flat(row, file.path.stem))
    else:
        rows = _tsv_rows(file)
    found = [*rows]
    if not found:
        raise file.error("is empty")
    return found


def _tsv_rows(file: File) -> Iterator[Row]:
    """A header and rows, as GLUE has them; or labels and messages, which may have tabs in them."""
    place, names = next(tsv_cells(file), (Place(str(file), 1), [""]))
    if names == [""]:
        return
    if len(names) == 1:
        raise place.error("neither JSON nor columns between tabs")
    if names[0] in SMS_LABELS:
        for place, cells in tsv_cells(file, 1):
            yield named_cells(place, ("label", "sms"), cells)
        return
    for place, cells in itertools.islice(tsv_cells(file), 1, None):
        yield named_cells(place, tuple(names), cells)


def _csv_rows(file: File) -> Iterator[Row]:
    """A header and rows; or MMLU's questions, four choices and letters."""
    table = [*csv_cells(file)]
    names = table[0][1] if table else []
    if len(names) != 2 + len(LETTERS) or names[-1] not in LETTERS:
        for place, cells in table[1:]:
            yield named_cells(place, tuple(names), cells)
        return
    subject = file.path.stem
    for ending in _MMLU_PARTS:
        subject = subject.removesuffix(ending)
    for place, cells in table:
        row = named_cells(place, ("question", *LETTERS, "answer"), cells)
        yield Row(
            place,
            {
                "question": row.values["question"],
                "choices": [row.values[letter] for letter in LETTERS],
                "answer": row.values["answer"],
                "subject": subject,
            },
        )


def _polarity(file: File) -> Iterator[Row]:
    """Pang and Lee's `rt-polarity.neg` and `.pos`, in NLTK's zip: a snippet a line, Latin-1."""
    for label in POLARITY_LABELS:
        try:
            with zipfile.ZipFile(file.path) as archive:
                (name,) = (n for n in archive.namelist() if n.endswith(f"rt-polarity.{label}"))
                content = archive.read(name)
        except OSError as error:
            raise UsageError(f"{file.flag}: cannot read {file.path}: {error.strerror}") from error
        except zipfile.BadZipFile as error:
            raise file.error(f"is no zip file: {error}") from error
        except ValueError as error:
            raise file.error(f"does not hold one rt-polarity.{label}") from error
        for place, line in decoded_lines(f"{file}/{name}", content, "latin-1"):
            yield Row(place, {"text": line, "label": label})


def _flat(row: Row, name: str) -> Iterator[Row]:
    names = row.values.keys()
    if {"version", "data"} <= names:
        yield from _squad(row)
    elif {"examples"} <= names <= {"canary", "examples"}:
        for number, example in enumerate(row.inner("examples"), 1):
            place = Place(row.place.origin, number, "example")
            yield Row(place, {"subject": name, **example.values})
    elif isinstance(row.values.get("passage"), dict):
        yield from _multirc(row)
    else:
        yield row


def _squad(row: Row) -> Iterator[Row]:
    """Articles of paragraphs of questions; those that are `is_impossible` have no answers."""
    numbers = itertools.count(1)
    for article in row.inner("data"):
        for paragraph in article.inner("paragraphs"):
            for question in paragraph.inner("qas"):
                place = Place(row.place.origin, next(numbers), "question")
                question = Row(place, question.values)
                values = {
                    "title": article.values.get("title", ""),
                    "context": paragraph.text("context"),
                    "question": question.text("question"),
                }
                if "answers" in question.values:
                    texts = [answer.text("text") for answer in question.inner("answers")]
                    values["answers"] = {"text": texts}
                yield Row(place, values)


def _multirc(row: Row) -> Iterator[Row]:
    """SuperGLUE's: passages of questions of answers."""
    passage = Row(row.place, row.field("passage", dict))
    for question in passage.inner("questions"):
        for answer in question.inner("answers"):
            values = {
                "paragraph": passage.text("text"),
                "question": question.text("question"),
                "answer": answer.text("text"),
            }
            if "label" in answer.values:
                values["label"] = answer.values["label"]
            yield Row(row.place, values)
