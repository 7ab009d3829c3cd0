"""What results look like: curves, bars and points, with deviations over runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import matplotlib
import matplotlib.axes
import matplotlib.figure
import numpy as np

from examples.llm.program.palettes import LIGHT
from examples.llm.program.spreads import Spread

_SERIES = len(LIGHT.series)
_LINES = ("-", "--", ":", "-.")
# A curve of more points is drawn as means of stretches.
_POINTS = 60


class Figure(NamedTuple):
    """A figure that is yet to be drawn, in the colours of Matplotlib's settings by then.

    Attributes:
      name: for its parts' ids.
      title: above it.
      height: in inches.
      draw: draws it on a Matplotlib figure, or a part of one.
    """

    name: str
    title: str
    height: float
    draw: Callable[[matplotlib.figure.FigureBase], None]


def curves(
    name: str, title: str, label: str, series: Mapping[str, tuple[Sequence[int], np.ndarray]]
) -> Figure:
    """Show how something goes with the steps: means over runs, and what is within a deviation.

    Args:
      name: of the figure, for its parts' ids.
      title: above it.
      label: of the vertical axis.
      series: by name the steps `(n,)` and what was measured `(runs, n)`.
    """

    def draw(figure: matplotlib.figure.FigureBase) -> None:
        axes = figure.subplots()
        for number, (label_of, (steps, measured)) in enumerate(series.items()):
            steps, measured = _thinned(np.asarray(steps), np.asarray(measured, np.float64))
            mean, colour = measured.mean(axis=0), f"C{number}"
            line = _LINES[number // _SERIES % len(_LINES)]
            marker = "o" if len(steps) <= 30 else None
            axes.plot(steps, mean, line, color=colour, label=label_of, marker=marker, markersize=3)
            if len(measured) > 1:
                deviation = measured.std(axis=0, ddof=1)
                axes.fill_between(
                    steps, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0
                )
        axes.set(title=title, xlabel="step", ylabel=label)
        axes.locator_params(axis="x", integer=True)
        figure.legend(loc="outside lower center", ncols=2)

    return Figure(name, title, 3.2 + 0.2 * -(-len(series) // 2), draw)


def bars(name: str, title: str, label: str, groups: Mapping[str, Mapping[str, Spread]]) -> Figure:
    """Show horizontal bars, with deviations where there are any and the mean beside each.

    Args:
      name: of the figure, for its parts' ids.
      title: above it.
      label: of the horizontal axis.
      groups: by the name of a colour the bars, by the name of a row.
    """
    rows = _rows(groups)
    thickness = 0.8 / len(groups)

    def draw(figure: matplotlib.figure.FigureBase) -> None:
        axes = figure.subplots()
        for number, (group, bars_) in enumerate(groups.items()):
            places = [rows.index(row) + (number + 0.5) * thickness - 0.4 for row in bars_]
            means, errors = _means_and_errors(bars_.values())
            axes.barh(places, means, 0.9 * thickness, color=f"C{number}", label=group)
            if any(errors):
                axes.errorbar(
                    means, places, xerr=errors, fmt="none", elinewidth=1,
                    ecolor=matplotlib.rcParams["text.color"],
                )  # fmt: skip
            for place, mean, error in zip(places, means, errors, strict=True):
                axes.annotate(
                    _number(mean), (mean + error, place), (4, 0), va="center",
                    textcoords="offset points", fontsize=8,
                )  # fmt: skip
        axes.margins(x=0.2)
        _name_rows(figure, axes, rows, title, label)

    return Figure(name, title, 1.4 + 0.22 * len(rows) * (1 + len(groups)), draw)


def points(
    name: str,
    title: str,
    label: str,
    groups: Mapping[str, Mapping[str, Spread]],
    lines: Mapping[str, float],
) -> Figure:
    """Show points with deviations, where differences count and zero does not.

    Args:
      name: of the figure, for its parts' ids.
      title: above it.
      label: of the horizontal axis.
      groups: by the name of a colour the points, by the name of a row.
      lines: vertical lines to compare with, by name.
    """
    rows = _rows(groups)

    def draw(figure: matplotlib.figure.FigureBase) -> None:
        axes = figure.subplots()
        for number, (group, points_) in enumerate(groups.items()):
            places = [rows.index(row) + (number + 0.5) / len(groups) - 0.5 for row in points_]
            means, errors = _means_and_errors(points_.values())
            axes.errorbar(
                means, places, xerr=errors, fmt="o", markersize=5, color=f"C{number}", label=group
            )
            for place, mean in zip(places, means, strict=True):
                axes.annotate(
                    f"{mean:.5g}", (mean, place), (5, 4),
                    textcoords="offset points", fontsize=8,
                )  # fmt: skip
        colour = matplotlib.rcParams["text.color"]
        for style, (words, place) in zip(("--", ":"), lines.items()):
            axes.axvline(place, linestyle=style, color=colour, linewidth=1, label=words)
        axes.margins(x=0.12)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        _name_rows(figure, axes, rows, title, label)

    return Figure(name, title, 1.6 + 0.22 * len(rows) * (1 + len(groups)), draw)


def _rows(groups: Mapping[str, Mapping[str, Spread]]) -> list[str]:
    return list(dict.fromkeys(row for in_row in groups.values() for row in in_row))


def _means_and_errors(spreads: Iterable[Spread]) -> tuple[list[float], list[float]]:
    spreads = list(spreads)
    return [spread.mean for spread in spreads], [spread.deviation or 0 for spread in spreads]


def _name_rows(
    figure: matplotlib.figure.FigureBase,
    axes: matplotlib.axes.Axes,
    rows: Sequence[str],
    title: str,
    label: str,
) -> None:
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=5)
    axes.set(title=title, xlabel=label)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        figure.legend(loc="outside lower center", ncols=3)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _thinned(steps: np.ndarray, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    stretch = -(-len(steps) // _POINTS)
    starts = np.arange(0, len(steps), stretch)
    sizes = np.diff(starts, append=len(steps))
    means = np.add.reduceat(measured, starts, axis=1) / sizes
    return np.add.reduceat(steps, starts) / sizes, means
