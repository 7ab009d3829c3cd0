"""What a run measures, line by line, while it runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.llm.program.json_numbers import without_nan


class MetricsLog:
    """A file of JSON lines, each of a step or of what a model is judged by; a context manager.

    Each line is in the file as soon as it is written. A run that goes on after a stop takes up its
    file where its checkpoint is: what was measured after that is measured again, and a last line
    that is torn is left out.
    """

    def __init__(self, path: Path | None, steps_done: int = 0):
        """Opens `path`, whose lines on more than `steps_done` steps are dropped; None for none."""
        self._file, self._written = None, set()
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if steps_done and line["step"] <= steps_done]
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(map(_as_line, kept)))
        fresh.replace(path)
        self._written = {_key(line) for line in kept}
        self._file = path.open("a")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._file is not None:
            self._file.close()

    def write(self, step: int, **measured: Any) -> None:
        """Add a line on the state after `step` steps, unless it is there; NaN is null."""
        line = {"step": step, **measured}
        if self._file is not None and _key(line) not in self._written:
            self._written.add(_key(line))
            self._file.write(_as_line(line))
            self._file.flush()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file, if there is one, up to the first that is torn."""
    if not path.exists():
        return
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            measured = json.loads(line)
        except ValueError:
            return
        if not line.endswith("\n"):
            return
        yield measured


def _key(line: dict[str, Any]) -> tuple[int, str]:
    """What no two lines have: a step, and what was judged then, if anything."""
    return line["step"], line.get("part", "")


def _as_line(measured: dict[str, Any]) -> str:
    return json.dumps(without_nan(measured), allow_nan=False) + "\n"
