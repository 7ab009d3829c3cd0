"""The colours of pages and pictures of results."""

from typing import NamedTuple


class Palette(NamedTuple):
    """Colours as `#rrggbb`.

    Attributes:
      text: what is read.
      faint: what is read last.
      paper: behind everything.
      panel: behind a figure.
      grid: rules and lines of figures.
      series: of what a figure compares, in order.
    """

    text: str
    faint: str
    paper: str
    panel: str
    grid: str
    series: tuple[str, ...]

    def as_css(self) -> str:
        """Return custom properties by the names of the colours: `--series-1` is the first's."""
        single = {name: getattr(self, name) for name in self._fields if name != "series"}
        numbered = {f"series-{number}": colour for number, colour in enumerate(self.series, 1)}
        return " ".join(f"--{name}: {colour};" for name, colour in (single | numbered).items())


LIGHT = Palette(
    "#1c2430", "#5b6675", "#ffffff", "#f5f7fa", "#d9dee5",
    ("#1f6fd6", "#d9690d", "#22874f", "#c5343a", "#7a4fc4", "#7d5a3c", "#c9458f", "#0d8488"),
)  # fmt: skip
DARK = Palette(
    "#e4e9f0", "#9aa6b5", "#12161c", "#1b212a", "#39424f",
    ("#6ea8ff", "#ffab5e", "#63cf9a", "#ff7b72", "#b79cff", "#cfa880", "#f48fc4", "#4fd1d6"),
)  # fmt: skip
