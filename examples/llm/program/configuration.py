"""Settings from a file and from flags, and the file that gives them back."""

import argparse
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from examples.llm.errors import UsageError

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

# A frozen dataclass of settings, with a docstring for each, and `config` among them.
Chosen = TypeVar("Chosen", bound="DataclassInstance")

# What is said of one invocation, not of the run.
_NOT_KEPT = ("config", "resume")


def read_settings(arguments: list[str] | None, default: Chosen) -> Chosen:
    """Return what flags say, else the file of `--config`, else `default`.

    Args:
      arguments: flags; by default the process's.
      default: what holds without either.

    Raises:
      UsageError: the file can't be read, or has an unknown name or a value of another type.
      SystemExit: flags are wrong, or ask for help.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    path = parser.parse_known_args(arguments)[0].config
    if path is not None:
        default = replace(default, **_values_of_file(path, type(default)))
    return tyro.cli(type(default), args=arguments, default=default)


def settings_as_json(settings: "DataclassInstance") -> dict[str, Any]:
    """Return what `--config` takes to give these settings again."""
    values = {name: value for name, value in asdict(settings).items() if name not in _NOT_KEPT}
    return json.loads(json.dumps(values, default=str))


def _values_of_file(path: Path, kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    values = {}
    for given, value in _content(path).items():
        name = given.replace("-", "_")
        if name not in hints or name in _NOT_KEPT:
            known = ", ".join(name for name in hints if name not in _NOT_KEPT)
            raise UsageError(f"--config: {path}: {given} is unknown, choose from {known}")
        values[name] = _converted(value, hints[name], f"{path}: {given}")
    return values


def _content(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text("utf-8")
        content = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except OSError as error:
        raise UsageError(f"--config: cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # of its text, JSON or TOML
        raise UsageError(f"--config: cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config: {path} must hold one object, is {type(content).__name__}")
    return content


def _converted(value: Any, hint: Any, where: str) -> Any:
    """A value of a file as a setting has it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (rest,) = (kind for kind in inner if kind is not types.NoneType)
        return None if value is None else _converted(value, rest, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_converted(item, inner[0], where) for item in value)
    if origin is Literal and isinstance(value, str) and value in inner:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    raise UsageError(f"--config: {where} must be {_words(hint)}, is {json.dumps(value)[:100]}")


def _words(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return f"an array, each {_words(inner[0])}"
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    return {int: "an integer", float: "a number", bool: "true or false"}.get(hint, "a string")
