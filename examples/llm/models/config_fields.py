"""The fields of a `config.json`, and what is said of one that is not what it must be."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from examples.llm.errors import UsageError


class ConfigFields:
    """Fields that may be anything; one that is null counts as missing, as in transformers."""

    def __init__(self, path: Path, fields: Mapping[str, Any], within: str = ""):
        """Holds the fields of a file, or those in the field `within` of it."""
        self._path, self._fields, self._within = path, fields, within

    def __contains__(self, name: str) -> bool:
        return self._fields.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Return whether a field is there, and is null."""
        return name in self._fields and self._fields[name] is None

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value as it is, `default` where there is none."""
        value = self._fields.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """Return a size; `default`, if there is one, where there is no such field."""
        value = self.get(name, default)
        if type(value) is not int or not least <= value < 2**31:
            raise self.wrong(name, f"an int of at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive number; `default`, if there is one, where there is no such field."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self.wrong(name, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return whether something holds."""
        value = self.get(name, default)
        if type(value) is not bool:
            raise self.wrong(name, "true or false")
        return value

    def token(self, name: str, count: int) -> int | None:
        """Return a token below `count`, the first of several, or None."""
        value = self.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if value is not None and (type(value) is not int or not 0 <= value < count):
            raise self.wrong(name, f"a token below {count}")
        return value

    def one_of(self, name: str, known: Collection[str], default: str | None = None) -> str:
        """Return a value that must be one of several."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in known:
            raise self.wrong(name, f"one of {', '.join(known)}")
        return value

    def only(self, name: str, value: Any) -> None:
        """Refuse a field that has another value than the one the models here are made for."""
        if self.get(name, value) != value:
            raise self.wrong(name, json.dumps(value))

    def part(self, name: str) -> "ConfigFields":
        """Return the fields in a field."""
        value = self.get(name)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return ConfigFields(self._path, value, f"{name}.")

    def wrong(self, name: str, right: str) -> UsageError:
        """The error of a field that is not `right`."""
        given = json.dumps(self._fields.get(name))[:200]
        return UsageError(
            f"--model: {self._path}: {self._within}{name} must be {right}, is {given}"
        )

    def impossible(self, error: ValueError) -> UsageError:
        """The error of fields that do not go together."""
        return UsageError(f"--model: {self._path}: {error}")
