"""What a run has found, on disk: there when it has ended, and whole."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.llm.program.events import RunResult
from examples.llm.program.json_numbers import with_nan, without_nan
from examples.llm.training.checkpoints import check_same

_FILE = "metrics.json"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is whole or not there; NaN is null."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n")
    fresh.replace(path)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write, which takes the place of `folder` when all is in it."""
    fresh = folder.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        yield fresh
        shutil.rmtree(folder, ignore_errors=True)
        fresh.replace(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_result(result: RunResult, identity: Mapping[str, Any], folder: Path) -> None:
    """Write a run's numbers, and what decides them, to `folder/metrics.json`."""
    write_json(folder / _FILE, {"identity": identity, **asdict(result)})


def finished_result(folder: Path, identity: Mapping[str, Any]) -> RunResult | None:
    """Return what `write_result` wrote, or None if it did not.

    Raises:
      UsageError: it was of a run with another identity.
    """
    try:
        content = json.loads((folder / _FILE).read_text())
        saved, result = content.pop("identity"), RunResult(**with_nan(content))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # there is none
    check_same(saved, identity, folder)
    return result
