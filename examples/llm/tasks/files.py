"""Records in files, and errors that name the file and the place in it."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from examples.llm.errors import UsageError

_ENCODING = "utf-8-sig"
_LONGEST_FIELD = 2**31 - 1  # of CSV; else 128 KB


@dataclass(frozen=True)
class Place:
    """Where something stands.

    Attributes:
      path: its file.
      number: which it is there, from 1.
      unit: of what it is the so manieth.
    """

    path: Path
    number: int
    unit: str = "line"

    def error(self, problem: str) -> UsageError:
        """The error that says what is wrong here."""
        return UsageError(f"--task: {self.path}, {self.unit} {self.number}: {problem}")

    def field(self, record: Any, name: str, kind: type = str) -> Any:
        """A field of a JSON object here.

        Raises:
          UsageError: there is no such field, or it is not of this type.
        """
        if not isinstance(record, Mapping) or name not in record:
            raise self.error(f"there is no field {name!r}")
        value = record[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(f"{name} must be a {kind.__name__}, got {value!r}")
        if kind is str and not _is_text(value):
            raise self.error(f"{name} must be text, got half a character in {value!r}")
        return value

    def choice(self, name: str, value: Any, choices: tuple[Any, ...]) -> int:
        """The number of `value` among `choices`."""
        if isinstance(value, bool) or value not in choices:
            names = " or ".join(map(repr, choices))
            raise self.error(f"{name} must be {names}, got {value!r}")
        return choices.index(value)


@dataclass(frozen=True)
class Line(Place):
    """A line that is not blank.

    Attributes:
      text: what it says, without its end.
    """

    text: str = ""


class Row(NamedTuple):
    """A JSON object, or a row of a CSV file.

    Attributes:
      place: where it stands.
      values: its fields by name.
    """

    place: Place
    values: dict[str, Any]


def read_lines(path: Path, encoding: str = _ENCODING) -> Iterator[Line]:
    """The lines of a file.

    Raises:
      UsageError: it can't be read, or a line is in another encoding.
    """
    return decoded_lines(path, _content(path), encoding)


def decoded_lines(path: Path, content: bytes, encoding: str) -> Iterator[Line]:
    """The lines in `content`, which was found at `path`; only a line feed ends one."""
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            text = line.decode(encoding).removesuffix("\r")
        except UnicodeDecodeError as error:
            raise Line(path, number).error(f"not {encoding}: {error.reason}") from error
        if text.strip():
            yield Line(path, number, text=text)


def holds_rows(path: Path) -> bool:
    """Whether `read_rows` is for a file: it is named `.csv`, or begins like JSON."""
    if path.suffix == ".csv":
        return True
    return _content(path, 1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")


def read_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSON file, which is an array or has one in each line, or a CSV file's rows.

    Raises:
      UsageError: it can't be read, or is something else.
    """
    if path.suffix == ".csv":
        yield from _csv_rows(path)
    elif _content(path, 1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        whole = Place(path, 1)
        for number, item in enumerate(_parsed(whole, _text(path)), 1):
            place = Place(path, number, "item")
            yield Row(place, _object(place, item))
    else:
        for line in read_lines(path):
            yield Row(line, _object(line, _parsed(line, line.text)))


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for number, row in enumerate(reader, 1):
            place = Place(path, number, "row")
            if None in row or None in row.values():
                raise place.error(f"must have the {len(reader.fieldnames or ())} columns of row 0")
            yield Row(place, row)
    except csv.Error as error:
        raise Place(path, reader.line_num).error(f"not CSV: {error}") from error


def _content(path: Path, most: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise UsageError(f"--task: cannot read {path}: {error.strerror}") from error


def _text(path: Path) -> str:
    try:
        return _content(path).decode(_ENCODING)
    except UnicodeDecodeError as error:
        raise UsageError(f"--task: {path} is not {_ENCODING}: {error.reason}") from error


def _parsed(place: Place, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise place.error(f"not JSON: {error}") from error


def _is_text(value: str) -> bool:
    """Whether it is without lone surrogates, which JSON can write and no tokenizer can read."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _object(place: Place, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise place.error(f"must be a JSON object, got {type(value).__name__}")
    return value
