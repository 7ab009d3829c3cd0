"""The benchmark's results: a file of numbers, a table, a page."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.llm.bench.cells import UNTRAINED, Cell, CellResult
from examples.llm.bench.settings import BenchSettings
from examples.llm.errors import UsageError
from examples.llm.models.opening import content_hash
from examples.llm.program import page
from examples.llm.program.figures import Figure, bars, points
from examples.llm.program.json_numbers import with_nan
from examples.llm.program.rendering import write_picture
from examples.llm.program.results import write_json
from examples.llm.program.spreads import Spread, spread_of
from examples.llm.tasks.sources import find_source

# What a result is made with; a file made with something else is neither added to nor replaced.
_SHARED = (
    "rate_factors", "seeds", "steps", "search_steps", "first_order_steps", "batch_size",
    "sequence_length", "objective", "head", "template", "train_examples", "dev_examples",
    "test_examples",
)  # fmt: skip
# What tells which cells there are; another run may ask for others.
_OF_CELLS = ("task", "tuning", "method", "data")
_MEBIBYTE = 2**20
_HEADINGS = (
    "task", "tuning", "method", "learning rate", "eps", "test loss", "test accuracy %", "test F1 %",
    "trains", "state MiB", "peak MiB", "step s", "steps", "forward passes",
)  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """Hashes of what results are of.

    Attributes:
      model: of its file or folder.
      tasks: of the data of each.
    """

    model: str
    tasks: Mapping[str, str]


def read_contents(settings: BenchSettings, model: Path) -> Contents:
    """Read the files of a model and of all tasks.

    Raises:
      UsageError: they can't be read.
    """
    sources = {task: find_source(task, settings.data) for task in settings.task}
    tasks = {task: source.identity() for task, source in sources.items()}
    return Contents(content_hash(model), tasks)


class Results:
    """Results by cell, kept in a JSON file that is complete after every cell.

    Raises:
      UsageError: there is a file with results of other settings, or of files that have changed.
    """

    def __init__(
        self,
        path: Path,
        settings: BenchSettings,
        model: str,
        about: Mapping[str, Any],
        contents: Contents,
    ):
        self.path = path
        shared = {name: getattr(settings, name) for name in (*_SHARED, *_OF_CELLS)}
        self.settings = json.loads(json.dumps({"model": model, **shared}, default=str))
        self.about, self.contents = dict(about), contents
        self.cells: dict[str, dict[str, Any]] = {}
        if path.exists():
            content = json.loads(path.read_text())
            _check_settings(path, content["settings"], self.settings)
            _check_contents(path, content["cells"].values(), model, contents)
            self.cells = {
                name: cell | {part: with_nan(cell[part]) for part in ("trials", "runs")}
                for name, cell in content["cells"].items()
            }

    def has(self, cell: Cell) -> bool:
        """Whether there is a result of a cell, and it is known of which files."""
        return "identity" in self.cells.get(cell.name, ())

    def add(self, cell: Cell, result: CellResult) -> None:
        """Add a result and write the file."""
        parts = {
            "task": cell.task,
            "tuning": cell.tuning,
            "method": cell.method,
            "identity": {"model": self.contents.model, "task": self.contents.tasks[cell.task]},
        }
        self.cells[cell.name] = parts | _plain(asdict(result))
        write_json(self.path, {**self.about, "settings": self.settings, "cells": self.cells})


def _check_contents(
    path: Path, cells: Iterable[Mapping[str, Any]], model: str, ours: Contents
) -> None:
    for cell in cells:
        theirs, task = cell.get("identity"), cell["task"]
        if theirs is None:
            continue
        for name, there, here in (
            (model, theirs["model"], ours.model),
            (task, theirs["task"], ours.tasks.get(task, theirs["task"])),
        ):
            if there != here:
                raise UsageError(
                    f"--output: {path} has results of {name} before it was changed, give another "
                    "folder"
                )


def _check_settings(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    differences = [
        f"{name} is {theirs.get(name)} there and {ours.get(name)} here"
        for name in {**theirs, **ours}
        if name not in _OF_CELLS and theirs.get(name) != ours.get(name)
    ]
    if differences:
        raise UsageError(
            f"--output: {path} has results of other settings ({'; '.join(differences)}), give "
            "another folder"
        )


def _plain(value: Any) -> Any:
    """Named tuples as dicts: JSON would make them lists."""
    as_dict = getattr(value, "_asdict", None)
    if as_dict is not None:
        value = as_dict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def test_score(cell: Mapping[str, Any], score: str) -> Spread:
    """A test score over the runs, in percent."""
    return spread_of(100 * run["test"]["scores"][score] for run in cell["runs"])


def test_loss(cell: Mapping[str, Any]) -> Spread:
    """The test loss over the runs."""
    return spread_of(run["test"]["loss"] for run in cell["runs"])


def markdown_table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one row per cell."""
    lines = [_row(_HEADINGS), _row("---" if n < 3 else "---:" for n in range(len(_HEADINGS)))]
    return "\n".join([*lines, *(_row(_fields(cell)) for cell in cells.values())]) + "\n"


def _row(fields) -> str:
    return f"| {' | '.join(fields)} |"


def _fields(cell: Mapping[str, Any]) -> list[str]:
    name = Path(cell["task"]).stem
    known = cell["runs"][0]["test"]["scores"]
    reached = [
        test_loss(cell).words(".3f"),
        *(
            test_score(cell, score).words(".1f") if score in known else ""
            for score in ("accuracy", "f1")
        ),
    ]
    cost = cell["cost"]
    if cost is None:
        return [name, "", cell["method"], "", "", *reached, *[""] * 6]
    more = f" + {cost['derivative']}" if cost["derivative"] else ""
    is_probing = cost["derivative"] == ""
    return [
        name,
        cell["tuning"],
        cell["method"],
        f"{cell['learning_rate']:.2g}",
        f"{cell['eps']:.0e}" if is_probing else "",
        *reached,
        f"{cost['trainable']:,}",
        f"{cost['state_bytes'] / _MEBIBYTE:,.1f}",
        f"{cost['peak_bytes'] / _MEBIBYTE:,.0f}",
        f"{cost['step_seconds']:.2f}",
        f"{cost['steps']:,}",
        f"{cost['forward_passes']:,}{more}",
    ]


def write_report(results: Results, folder: Path) -> None:
    """Write a page, `report.html`, of a table and each task's figures, and these, `report.png`."""
    cells, about = results.cells, results.about
    tasks = dict.fromkeys(cell["task"] for cell in cells.values())
    figures = {
        task: _figures(f"task-{number}", task, cells.values()) for number, task in enumerate(tasks)
    }
    drawn = [figure for of_task in figures.values() for figure in of_task]
    if drawn:
        write_picture(drawn, folder / "report.png")
    rows = [_fields(cell) for cell in cells.values()]
    sections = [
        page.Section("Results", page.table(_HEADINGS, rows, texts=3)),
        *(
            page.Section(Path(task).stem, page.figures(of_task))
            for task, of_task in figures.items()
        ),
        page.Section("Command", page.preformatted(about["command"])),
        page.Section("Settings", page.pairs(results.settings)),
        page.Section("Versions", page.pairs(about["versions"])),
    ]
    title = f"Fine-tuning {results.settings['model']} without backpropagation"
    whole = page.page(title, f"{about['date']} · {about['machine']}", sections)
    (folder / "report.html").write_text(whole)


def _figures(name: str, task: str, cells: Iterable[Mapping[str, Any]]) -> list[Figure]:
    ours = [cell for cell in cells if cell["task"] == task]
    trained = [cell for cell in ours if cell["method"] not in UNTRAINED]
    accuracies: dict[str, dict[str, Spread]] = {}
    peaks: dict[str, dict[str, Spread]] = {}
    for cell in trained:
        scheme, method = cell["tuning"], cell["method"]
        accuracies.setdefault(scheme, {})[method] = test_score(cell, "accuracy")
        peak = cell["cost"]["peak_bytes"] / _MEBIBYTE
        peaks.setdefault(scheme, {})[method] = Spread(peak, None)
    if not trained:
        return []
    lines = {
        cell["method"]: test_score(cell, "accuracy").mean
        for cell in ours
        if cell["method"] in UNTRAINED
    }
    about = Path(task).stem
    return [
        points(f"{name}-accuracy", f"Test accuracy, {about}", "%", accuracies, lines),
        bars(f"{name}-memory", f"Peak memory, {about}", "MiB", peaks),
    ]
