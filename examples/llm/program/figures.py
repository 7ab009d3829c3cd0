"""Figures as SVG that takes its colours from the page around it, and so fits a dark one, too."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.axes
import matplotlib.figure
import numpy as np

from examples.llm.program.spreads import Spread

# What Matplotlib draws with, and the page's own colour in its place.
_SERIES = tuple(f"#0000{number:02x}" for number in range(1, 9))
_TEXT, _GRID = "#0000fe", "#0000fd"
_COLOURS = {_TEXT: "currentColor", _GRID: "var(--grid)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, 1)
}
_LINES = ("-", "--", ":", "-.")
# A curve of more points is drawn as means of stretches.
_POINTS = 60
_WIDTH = 5.0  # inches, of 72 units each: text is legible on a telephone
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "svg.fonttype": "path",
    "text.color": _TEXT,
    "axes.edgecolor": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.formatter.useoffset": False,
}


def curves(
    name: str, title: str, label: str, series: Mapping[str, tuple[Sequence[int], np.ndarray]]
) -> str:
    """Draw how something goes with the steps: means over runs, and what is within a deviation.

    Args:
      name: of the figure, for its parts' ids.
      title: above it.
      label: of the vertical axis.
      series: by name the steps `(n,)` and what was measured `(runs, n)`.
    """
    with matplotlib.rc_context(_STYLE):
        rows = -(-len(series) // 2)
        figure, axes = _axes(3.2 + 0.2 * rows)
        for number, (label_of, (steps, measured)) in enumerate(series.items()):
            steps, measured = _thinned(np.asarray(steps), np.asarray(measured, np.float64))
            mean, colour = measured.mean(axis=0), _SERIES[number % len(_SERIES)]
            line = _LINES[number // len(_SERIES) % len(_LINES)]
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
        return _as_svg(figure, name, title)


def bars(name: str, title: str, label: str, groups: Mapping[str, Mapping[str, Spread]]) -> str:
    """Draw horizontal bars, with deviations where there are any and the mean beside each.

    Args:
      name: of the figure, for its parts' ids.
      title: above it.
      label: of the horizontal axis.
      groups: by the name of a colour the bars, by the name of a row.
    """
    rows = list(dict.fromkeys(row for bars_ in groups.values() for row in bars_))
    height = 0.8 / len(groups)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(1.4 + 0.22 * len(rows) * (1 + len(groups)))
        for number, (group, bars_) in enumerate(groups.items()):
            places = [rows.index(row) + (number + 0.5) * height - 0.4 for row in bars_]
            means, errors = _means_and_errors(bars_.values())
            colour = _SERIES[number % len(_SERIES)]
            axes.barh(places, means, 0.9 * height, color=colour, label=group)
            if any(errors):
                axes.errorbar(means, places, xerr=errors, ecolor=_TEXT, elinewidth=1, fmt="none")
            for place, mean, error in zip(places, means, errors, strict=True):
                axes.annotate(
                    _number(mean), (mean + error, place), (4, 0), va="center",
                    textcoords="offset points", fontsize=8,
                )  # fmt: skip
        axes.margins(x=0.2)
        return _with_rows(figure, axes, rows, name, title, label)


def points(
    name: str,
    title: str,
    label: str,
    groups: Mapping[str, Mapping[str, Spread]],
    lines: Mapping[str, float],
) -> str:
    """Draw points with deviations, where differences count and zero does not.

    Args:
      name: of the figure, for its parts' ids.
      title: above it.
      label: of the horizontal axis.
      groups: by the name of a colour the points, by the name of a row.
      lines: vertical lines to compare with, by name.
    """
    rows = list(dict.fromkeys(row for points_ in groups.values() for row in points_))
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(1.6 + 0.22 * len(rows) * (1 + len(groups)))
        for number, (group, points_) in enumerate(groups.items()):
            places = [rows.index(row) + (number + 0.5) / len(groups) - 0.5 for row in points_]
            means, errors = _means_and_errors(points_.values())
            colour = _SERIES[number % len(_SERIES)]
            axes.errorbar(
                means, places, xerr=errors, fmt="o", markersize=5, color=colour, label=group
            )
            for place, mean in zip(places, means, strict=True):
                axes.annotate(
                    f"{mean:.5g}", (mean, place), (5, 4),
                    textcoords="offset points", fontsize=8,
                )  # fmt: skip
        for style, (words, place) in zip(("--", ":"), lines.items()):
            axes.axvline(place, linestyle=style, color=_TEXT, linewidth=1, label=words)
        axes.margins(x=0.12)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        return _with_rows(figure, axes, rows, name, title, label)


def _means_and_errors(spreads: Iterable[Spread]) -> tuple[list[float], list[float]]:
    spreads = list(spreads)
    return [spread.mean for spread in spreads], [spread.deviation or 0 for spread in spreads]


def _with_rows(
    figure: matplotlib.figure.Figure,
    axes: matplotlib.axes.Axes,
    rows: Sequence[str],
    name: str,
    title: str,
    label: str,
) -> str:
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=5)
    axes.set(title=title, xlabel=label)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        figure.legend(loc="outside lower center", ncols=3)
    return _as_svg(figure, name, title)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _axes(height: float) -> tuple[matplotlib.figure.Figure, matplotlib.axes.Axes]:
    figure = matplotlib.figure.Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _thinned(steps: np.ndarray, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    stretch = -(-len(steps) // _POINTS)
    starts = np.arange(0, len(steps), stretch)
    sizes = np.diff(starts, append=len(steps))
    means = np.add.reduceat(measured, starts, axis=1) / sizes
    return np.add.reduceat(steps, starts) / sizes, means


def _as_svg(figure: matplotlib.figure.Figure, name: str, title: str) -> str:
    """The `svg` element, with ids that no other figure has, and no link to anywhere."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', _opening(title), svg)
    return re.sub(r"#0000[0-9a-f]{2}", lambda match: _COLOURS[match[0]], svg)


def _opening(title: str) -> str:
    return rf'<svg \g<1> role="img" aria-label="{title}">'
