"""The figure of the page: steps against optax's, and by size."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

MARKERS = {"matrix": "o", "large": "s", "tree": "^"}


def draw(ratios: dict[str, dict[str, float]], sizes: dict[str, dict[int, float]], path: Path):
    """Draws ratios to optax.adamw, and nanoseconds an element by the number of elements.

    Args:
      ratios: By workload and contestant; the workloads in the order of `MARKERS`.
      sizes: By contestant and number of elements.
      path: Of the PNG.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 6), layout="constrained")
    draw_ratios(left, ratios)
    draw_sizes(right, sizes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_ratios(axes: Any, ratios: dict[str, dict[str, float]]) -> None:
    """A row for each contestant, a marker for each workload."""
    names = list(dict.fromkeys(name for column in ratios.values() for name in column))[::-1]
    for (workload, column), marker in zip(ratios.items(), MARKERS.values()):
        rows = [names.index(name) for name in column]
        axes.plot(list(column.values()), rows, marker, label=workload, alpha=0.8)
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("time of a step, times that of optax.adamw in float32 (minima)")
    axes.legend()


def draw_sizes(axes: Any, sizes: dict[str, dict[int, float]]) -> None:
    """A line for each contestant."""
    for number, (name, column) in enumerate(sizes.items()):
        style = "-" if number < 10 else "--"  # the colors repeat after ten
        axes.plot(list(column), list(column.values()), style, marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("elements of a matrix")
    axes.set_ylabel("ns an element (minimum)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
