"""A task's results as papers have them: methods by schemes of tuning."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.llm.bench.report import test_loss, test_score


def matrices(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return, of each task, a table of test accuracies and losses: a row for each method.

    Args:
      cells: as in `Results`.
    """
    tasks = dict.fromkeys(cell["task"] for cell in cells.values())
    return "\n".join(
        f"### {Path(task).stem}\n\n"
        + _matrix([cell for cell in cells.values() if cell["task"] == task])
        for task in tasks
    )


def _matrix(cells: list[Mapping[str, Any]]) -> str:
    tunings = [*dict.fromkeys(cell["tuning"] for cell in cells if cell["cost"])]
    found = {(cell["method"], cell["tuning"]): cell for cell in cells}
    lines = [["accuracy %, loss", *tunings], ["---", *["---:"] * len(tunings)]]
    for method in dict.fromkeys(cell["method"] for cell in cells):
        row = [found.get((method, tuning)) for tuning in tunings]
        if not any(cell and cell["cost"] for cell in row):
            row = [found[method, "full"]] * len(tunings)  # an untrained model has no tuning
        lines.append([method, *("" if cell is None else _reached(cell) for cell in row)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _reached(cell: Mapping[str, Any]) -> str:
    return f"{test_score(cell, 'accuracy').words('.1f')}, {test_loss(cell).words('.3f')}"
