"""The benchmark's results: a file of numbers, a table, a picture."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.figure

from examples.llm.bench.cells import UNTRAINED, Cell, CellResult
from examples.llm.bench.settings import BenchSettings

# What a result is made with; a file made with something else is not added to.
_SHARED = (
    "rate_factors", "seeds", "steps", "search_steps", "first_order_steps", "batch_size",
    "sequence_length", "objective", "template", "train_examples", "dev_examples", "test_examples",
)  # fmt: skip
_MEBIBYTE = 2**20
_HEADINGS = (
    "task", "tuning", "method", "learning rate", "eps", "test accuracy %", "test F1 %", "trains",
    "state MiB", "peak MiB", "step s", "steps", "forward passes",
)  # fmt: skip


class Results:
    """Results by cell, kept in a JSON file that is complete after every cell."""

    def __init__(self, path: Path, settings: BenchSettings, model: str, about: Mapping[str, Any]):
        self.path = path
        made_with = {"model": model, **{name: getattr(settings, name) for name in _SHARED}}
        self.made_with = json.loads(json.dumps(made_with))
        self.about = dict(about)
        self.cells: dict[str, dict[str, Any]] = {}
        if path.exists():
            content = json.loads(path.read_text())
            if content["settings"] == self.made_with:
                self.cells = content["cells"]

    def add(self, cell: Cell, result: CellResult) -> None:
        """Add a result and write the file."""
        parts = {"task": cell.task, "tuning": cell.tuning, "method": cell.method}
        self.cells[cell.name] = parts | _plain(asdict(result))
        content = {**self.about, "settings": self.made_with, "cells": self.cells}
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(content, indent=1) + "\n")
        fresh.replace(self.path)


def _plain(value: Any) -> Any:
    """Named tuples as dicts: JSON would make them lists."""
    as_dict = getattr(value, "_asdict", None)
    if as_dict is not None:
        value = as_dict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def spread(cell: Mapping[str, Any], score: str) -> tuple[float, float | None]:
    """Mean and sample standard deviation of a test score over the runs, in percent."""
    values = [100 * run["test"]["scores"][score] for run in cell["runs"]]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def markdown_table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one row per cell."""
    lines = [_row(_HEADINGS), _row("---" if n < 3 else "---:" for n in range(len(_HEADINGS)))]
    return "\n".join([*lines, *(_row(_fields(cell)) for cell in cells.values())]) + "\n"


def _row(fields) -> str:
    return f"| {' | '.join(fields)} |"


def _fields(cell: Mapping[str, Any]) -> list[str]:
    name = Path(cell["task"]).stem
    known = cell["runs"][0]["test"]["scores"]
    scores = [
        _with_spread(*spread(cell, score)) if score in known else "" for score in ("accuracy", "f1")
    ]
    cost = cell["cost"]
    if cost is None:
        return [name, "", cell["method"], "", "", *scores, *[""] * 6]
    more = f" + {cost['derivative']}" if cost["derivative"] else ""
    is_probing = cost["derivative"] == ""
    return [
        name,
        cell["tuning"],
        cell["method"],
        f"{cell['learning_rate']:.2g}",
        f"{cell['eps']:.0e}" if is_probing else "",
        *scores,
        f"{cost['trainable']:,}",
        f"{cost['state_bytes'] / _MEBIBYTE:,.1f}",
        f"{cost['peak_bytes'] / _MEBIBYTE:,.0f}",
        f"{cost['step_seconds']:.2f}",
        f"{cost['steps']:,}",
        f"{cost['forward_passes']:,}{more}",
    ]


def _with_spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def draw(cells: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write a PNG: accuracy of each method by scheme, and its peak memory; a row for each task."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells.values()))
    figure = matplotlib.figure.Figure(figsize=(12, 5 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for (left, right), task in zip(axes, tasks, strict=True):
        ours = [cell for cell in cells.values() if cell["task"] == task]
        trained = [cell for cell in ours if cell["method"] not in UNTRAINED]
        methods = list(dict.fromkeys(cell["method"] for cell in trained))
        schemes = list(dict.fromkeys(cell["tuning"] for cell in trained))
        for number, scheme in enumerate(schemes):
            chosen = [cell for cell in trained if cell["tuning"] == scheme]
            height = 0.8 / len(schemes)
            places = [methods.index(cell["method"]) + number * height for cell in chosen]
            spreads = [spread(cell, "accuracy") for cell in chosen]
            means, errors = [mean for mean, _ in spreads], [error or 0 for _, error in spreads]
            left.barh(places, means, height, xerr=errors, label=scheme)
            peaks = [cell["cost"]["peak_bytes"] / _MEBIBYTE for cell in chosen]
            right.barh(places, peaks, height, label=scheme)
        for cell in ours:
            if cell["method"] in UNTRAINED:
                style = {"ls": ("--", ":")[UNTRAINED.index(cell["method"])], "color": "black"}
                left.axvline(spread(cell, "accuracy")[0], label=cell["method"], **style)
        for part, label in ((left, "test accuracy, %"), (right, "peak memory, MiB")):
            centers = [row + 0.4 - 0.4 / max(len(schemes), 1) for row in range(len(methods))]
            part.set_yticks(centers, methods)
            part.invert_yaxis()
            part.set(title=Path(task).stem, xlabel=label)
        left.legend()
    figure.savefig(path, dpi=120)
