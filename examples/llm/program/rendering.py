"""Figures as SVG that takes its colours from the page around it, and as one picture of all."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
from matplotlib.rcsetup import cycler

from examples.llm.program.figures import Figure
from examples.llm.program.palettes import LIGHT, Palette

_WIDTH = 5.0  # inches, of 72 units each: text is legible on a telephone
_DOTS_PER_INCH = 150
_COLUMNS = 2
# What Matplotlib draws with, and the page's own colour in its place.
_MARKS = Palette(
    "#0000fe", "#0000fc", "#0000fb", "#0000fa", "#0000fd",
    tuple(f"#0000{number:02x}" for number in range(1, 1 + len(LIGHT.series))),
)  # fmt: skip
_COLOURS = {_MARKS.text: "currentColor", _MARKS.grid: "var(--grid)"} | {
    mark: f"var(--series-{number})" for number, mark in enumerate(_MARKS.series, 1)
}


def as_svg(figure: Figure) -> str:
    """Return the `svg` element, with ids that no other figure has, and no link to anywhere."""
    file = io.StringIO()
    with matplotlib.rc_context({**_style(_MARKS), "svg.hashsalt": figure.name}):
        canvas = matplotlib.figure.Figure(figsize=(_WIDTH, figure.height), layout="constrained")
        figure.draw(canvas)
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{figure.name}-", svg)
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', _opening(figure.title), svg)
    return re.sub(r"#0000[0-9a-f]{2}", lambda match: _COLOURS[match[0]], svg)


def _opening(title: str) -> str:
    return rf'<svg \g<1> role="img" aria-label="{title}">'


def write_picture(figures: Sequence[Figure], path: Path) -> None:
    """Write figures, two beside each other, as one PNG."""
    rows = [figures[start : start + _COLUMNS] for start in range(0, len(figures), _COLUMNS)]
    heights = [max(figure.height for figure in row) for row in rows]
    with matplotlib.rc_context(_style(LIGHT)):
        canvas = matplotlib.figure.Figure(
            figsize=(_COLUMNS * _WIDTH, sum(heights)), layout="constrained"
        )
        parts = canvas.subfigures(len(rows), _COLUMNS, height_ratios=heights, squeeze=False)
        for row, places in zip(rows, parts, strict=True):
            for figure, place in zip(row, places):
                figure.draw(place)
        canvas.savefig(path, format="png", dpi=_DOTS_PER_INCH)


def _style(palette: Palette) -> dict[Any, Any]:
    return {
        "font.size": 10,
        "svg.fonttype": "path",
        "figure.facecolor": palette.paper,
        "axes.facecolor": palette.paper,
        "text.color": palette.text,
        "axes.edgecolor": palette.text,
        "axes.labelcolor": palette.text,
        "axes.prop_cycle": cycler(color=palette.series),
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": palette.text,
        "ytick.color": palette.text,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": palette.grid,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "axes.formatter.useoffset": False,
    }
