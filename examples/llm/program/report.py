"""What a comparison shows at its end: a table, a picture and a file of numbers."""

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib.axes
import matplotlib.figure
from rich.table import Table

from examples.llm.program.events import RunResult
from examples.llm.program.settings import Settings

_MEBIBYTE = 2**20


def comparison_table(results: Sequence[RunResult]) -> Table:
    """Return one row per method: held-out loss, memory and time."""
    table = Table(title="Fine-tuning")
    table.add_column("method", no_wrap=True)
    for heading in (
        "held-out loss before",
        "held-out loss after",
        "optimizer state MiB",
        "peak memory MiB",
        "median step s",
    ):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.method,
            f"{result.loss_before:.4f}",
            f"{result.loss_after:.4f}",
            f"{result.state_bytes / _MEBIBYTE:,.1f}",
            f"{result.peak_bytes / _MEBIBYTE:,.0f}",
            f"{statistics.median(result.step_seconds):.2f}",
        )
    return table


def scores_table(results: Sequence[RunResult]) -> Table:
    """Return one row per held-out score and method."""
    table = Table(title="Held-out data")
    table.add_column("score")
    table.add_column("method", no_wrap=True)
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for score in results[0].scores_after:
        for result in results:
            before, after = (
                f"{values[score]:.3f}" for values in (result.scores_before, result.scores_after)
            )
            table.add_row(score, result.method, before, after)
    return table


def draw_comparison(results: Sequence[RunResult], path: Path) -> None:
    """Write a PNG with the training losses on the left and the memory on the right."""
    height = 4 + 0.4 * len(results)
    figure = matplotlib.figure.Figure(figsize=(12, height), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    for result, style in zip(results, itertools.cycle(("-", "--", ":", "-."))):
        steps = range(1, len(result.losses) + 1)
        curves.plot(steps, result.losses, style, marker=".", label=result.method)
    curves.set(title="Training loss", xlabel="step", ylabel="loss")
    curves.legend()
    curves.grid(alpha=0.3)
    _draw_memory(bars, results)
    figure.savefig(path, dpi=120)


def _draw_memory(axes: matplotlib.axes.Axes, results: Sequence[RunResult]) -> None:
    thickness = 0.4
    for offset, label, sizes in (
        (-thickness / 2, "optimizer state", [result.state_bytes for result in results]),
        (thickness / 2, "peak of the process", [result.peak_bytes for result in results]),
    ):
        bars = axes.barh(
            [row + offset for row in range(len(results))],
            [size / _MEBIBYTE for size in sizes],
            thickness,
            label=label,
        )
        axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.set_yticks(range(len(results)), [result.method for result in results])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title="Memory", xlabel="MiB")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def write_run_metrics(result: RunResult, folder: Path) -> None:
    """Write one method's numbers to `folder/metrics.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "metrics.json", asdict(result))


def write_metrics(settings: Settings, results: Sequence[RunResult], path: Path) -> None:
    """Write the settings and every method's numbers as JSON."""
    _write_json(path, {"settings": asdict(settings), "runs": [asdict(run) for run in results]})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")
