"""Lines of files, and errors that name the file and the line."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.llm.errors import UsageError


@dataclass(frozen=True)
class Line:
    """A line that is not blank.

    Attributes:
      path: its file.
      number: its number, from 1.
      text: what it says, without its end.
    """

    path: Path
    number: int
    text: str

    def error(self, problem: str) -> UsageError:
        """The error that says what is wrong here."""
        return UsageError(f"--task: {self.path}, line {self.number}: {problem}")

    def json_object(self) -> dict[str, Any]:
        """The object that the line holds."""
        try:
            value = json.loads(self.text)
        except ValueError as error:
            raise self.error(f"not JSON: {error}") from error
        if not isinstance(value, dict):
            raise self.error(f"must be a JSON object, got {type(value).__name__}")
        return value

    def field(self, record: Any, name: str, kind: type = str) -> Any:
        """A field of a JSON object in this line.

        Raises:
          UsageError: there is no such field, or it is not of this type.
        """
        if not isinstance(record, Mapping) or name not in record:
            raise self.error(f"there is no field {name!r}")
        value = record[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(f"{name} must be a {kind.__name__}, got {value!r}")
        return value

    def choice(self, name: str, value: Any, choices: tuple[Any, ...]) -> int:
        """The number of `value` among `choices`."""
        if isinstance(value, bool) or value not in choices:
            names = " or ".join(map(repr, choices))
            raise self.error(f"{name} must be {names}, got {value!r}")
        return choices.index(value)


def read_lines(path: Path, encoding: str = "utf-8-sig") -> Iterator[Line]:
    """The lines of a file.

    Raises:
      UsageError: it can't be read, or a line is in another encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--task: cannot read {path}: {error.strerror}") from error
    return decoded_lines(path, content, encoding)


def decoded_lines(path: Path, content: bytes, encoding: str) -> Iterator[Line]:
    """The lines in `content`, which was found at `path`; only a line feed ends one."""
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            text = line.decode(encoding).removesuffix("\r")
        except UnicodeDecodeError as error:
            raise Line(path, number, "").error(f"not {encoding}: {error.reason}") from error
        if text.strip():
            yield Line(path, number, text)
