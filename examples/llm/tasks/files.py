"""Rows of files, and errors that name the file and the place in it."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.llm.errors import UsageError

_ENCODING = "utf-8-sig"
_LONGEST_FIELD = 2**31 - 1  # of CSV; else 128 KB


@dataclass(frozen=True)
class Place:
    """Where something stands.

    Attributes:
      origin: the flag that named it, and what it named.
      number: which it is there, from 1.
      unit: of what it is the so manieth.
    """

    origin: str
    number: int
    unit: str = "line"

    def error(self, problem: str) -> UsageError:
        """The error that says what is wrong here."""
        return UsageError(f"{self.origin}, {self.unit} {self.number}: {problem}")


@dataclass(frozen=True)
class Row:
    """A JSON object, or a row of a table.

    Attributes:
      place: where it stands.
      values: its fields by name.
    """

    place: Place
    values: Mapping[str, Any]

    def field(self, name: str, kind: type) -> Any:
        """A field of this type.

        Raises:
          UsageError: there is no such field, or it is not of this type.
        """
        if name not in self.values:
            raise self.place.error(f"there is no field {name!r}")
        value = self.values[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.place.error(f"{name} must be a {kind.__name__}, got {value!r}")
        if kind is str and not _is_text(value):
            raise self.place.error(f"{name} must be text, got half a character in {value!r}")
        return value

    def text(self, name: str) -> str:
        """A field that is text."""
        return self.field(name, str)

    def texts(self, name: str) -> list[str]:
        """A field that is a list of texts."""
        items = self.field(name, list)
        return [
            Row(self.place, {f"{name}[{n}]": x}).text(f"{name}[{n}]") for n, x in enumerate(items)
        ]

    def choice(self, name: str, *choices: tuple[Any, ...]) -> int:
        """The number of the choice that a field names; each has one spelling or several."""
        if name not in self.values:
            raise self.place.error(f"there is no field {name!r}")
        value = self.values[name]
        for number, spellings in enumerate(choices):
            # True is no 1, nor 1.0.
            if any(type(value) is type(known) and value == known for known in spellings):
                return number
        names = " or ".join(repr(spellings[0]) for spellings in choices)
        raise self.place.error(f"{name} must be {names}, got {value!r}")

    def inner(self, name: str) -> "list[Row]":
        """The objects in a list, each a row; all are at this one's place."""
        items = self.field(name, list)
        return [Row(self.place, _object(self.place, item, f"{name}: ")) for item in items]


@dataclass(frozen=True)
class File:
    """A file that the user named.

    Attributes:
      path: where it is.
      flag: that named it.
    """

    path: Path
    flag: str = "--task"

    def __str__(self):
        return f"{self.flag}: {self.path}"

    def error(self, problem: str) -> UsageError:
        """The error that says what is wrong with it."""
        return UsageError(f"{self} {problem}")

    def content(self) -> bytes:
        """All its bytes.

        Raises:
          UsageError: it can't be read.
        """
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UsageError(f"{self.flag}: cannot read {self.path}: {error.strerror}") from error

    def text(self) -> str:
        """All its text.

        Raises:
          UsageError: it can't be read, or is not in UTF-8.
        """
        try:
            return self.content().decode(_ENCODING)
        except UnicodeDecodeError as error:
            raise self.error(f"is not UTF-8: {error.reason}") from error


def decoded_lines(
    origin: str, content: bytes, encoding: str = _ENCODING
) -> Iterator[tuple[Place, str]]:
    """The lines that are not blank; only a line feed ends one.

    Raises:
      UsageError: a line is in another encoding.
    """
    for number, line in enumerate(content.split(b"\n"), 1):
        place = Place(origin, number)
        try:
            text = line.decode(encoding).removesuffix("\r")
        except UnicodeDecodeError as error:
            raise place.error(f"not {encoding}: {error.reason}") from error
        if text.strip():
            yield place, text


def json_rows(file: File) -> Iterator[Row]:
    """The objects of a JSON file: an array, one in each line, or a single one over many lines.

    Raises:
      UsageError: it can't be read, or is something else.
    """
    content = file.content()
    whole = Place(str(file), 1)
    if _starts(content, b"["):
        for number, item in enumerate(_parsed(whole, file.text()), 1):
            place = Place(str(file), number, "item")
            yield Row(place, _object(place, item))
        return
    lines = decoded_lines(str(file), content)
    first = next(lines, (whole, ""))
    try:
        json.loads(first[1])
    except (ValueError, RecursionError):
        yield Row(whole, _object(whole, _parsed(whole, file.text())))
        return
    for place, line in (first, *lines):
        yield Row(place, _object(place, _parsed(place, line)))


def csv_cells(file: File) -> Iterator[tuple[Place, list[str]]]:
    """The rows of a CSV file, its header among them, which is row 0.

    Raises:
      UsageError: it can't be read, or is no CSV.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(file.text(), newline=""), strict=True)
    try:
        for number, cells in enumerate(filter(None, reader)):
            yield Place(str(file), number, "row"), cells
    except csv.Error as error:
        raise Place(str(file), reader.line_num).error(f"not CSV: {error}") from error


def tsv_cells(file: File, most: int = -1) -> Iterator[tuple[Place, list[str]]]:
    """The lines of a file of columns between tabs, which has no quoting, its header among them.

    Args:
      file: to be read.
      most: tabs of a line that count; those after it belong to the last column; -1 for all.
    """
    for place, line in decoded_lines(str(file), file.content()):
        yield place, line.split("\t", most)


def named_cells(place: Place, names: tuple[str, ...], cells: list[str]) -> Row:
    """A row of a table.

    Raises:
      UsageError: it has more columns than there are names, or fewer.
    """
    if len(cells) != len(names):
        raise place.error(f"must have {len(names)} columns, got {len(cells)}")
    return Row(place, dict(zip(names, cells, strict=True)))


def is_json(file: File) -> bool:
    """Whether a file begins like JSON.

    Raises:
      UsageError: it can't be read.
    """
    content = file.content()
    return _starts(content, b"{") or _starts(content, b"[")


def _starts(content: bytes, bracket: bytes) -> bool:
    return content[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(bracket)


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


def _object(place: Place, value: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise place.error(f"{where}must be a JSON object, got {type(value).__name__}")
    return value
