"""A page of results that needs no other file: tables and figures, in light and in dark."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from examples.llm.program.figures import Figure
from examples.llm.program.palettes import DARK, LIGHT
from examples.llm.program.rendering import as_svg

_COLOURS = f"""
:root {{ color-scheme: light dark; {LIGHT.as_css()} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK.as_css()} }} }}"""
_STYLE = """
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem;
  color: var(--text); background: var(--paper); font: 1rem/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 0.75rem; }
.about { color: var(--faint); margin: 0.25rem 0 0; overflow-wrap: anywhere; }
.figures {
  display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
}
figure { margin: 0; padding: 0.75rem; border-radius: 0.5rem; background: var(--panel); }
figure svg { display: block; width: 100%; height: auto; max-width: 38rem; margin: 0 auto; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.9rem 0.3rem 0; text-align: left; border-bottom: 1px solid var(--grid); }
th { color: var(--faint); font-weight: 600; vertical-align: bottom; }
td.number, th.number { text-align: right; }
td { white-space: nowrap; }
.settings td:last-child { white-space: normal; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: 0.9rem; }
"""


class Section(NamedTuple):
    """A part of a page.

    Attributes:
      heading: above it.
      body: HTML.
    """

    heading: str
    body: str


def page(title: str, about: str, sections: Iterable[Section]) -> str:
    """Return a whole HTML file.

    Args:
      title: of the page, plain text.
      about: a line below it, plain text.
      sections: its parts.
    """
    parts = [
        f'<section id="part-{number}"><h2>{html.escape(section.heading)}</h2>\n'
        f"{section.body}</section>"
        for number, section in enumerate(sections)
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{html.escape(title)}</title>\n<style>{_COLOURS}{_STYLE}</style>\n</head>\n<body>",
            f'<h1>{html.escape(title)}</h1>\n<p class="about">{html.escape(about)}</p>',
            *parts,
            "</body>\n</html>\n",
        ]
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> str:
    """Return a table of plain text, of whose columns all but the first `texts` are numbers."""

    def line(tag: str, fields: Sequence[str]) -> str:
        kinds = [""] * texts + [' class="number"'] * (len(fields) - texts)
        cells = (
            f"<{tag}{kind}>{html.escape(field)}</{tag}>"
            for kind, field in zip(kinds, fields, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return (
        f'<div class="table"><table>\n<thead>{line("th", headings)}</thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>\n"
    )


def pairs(values: Mapping[str, Any]) -> str:
    """Return a table of names and values, but for those that are left out."""
    given = {name: value for name, value in values.items() if value not in (None, "", [])}
    words = ([name, _words(value)] for name, value in given.items())
    rows = table(("name", "value"), words, texts=2)
    return f'<div class="settings">{rows}</div>'


def figures(shown: Iterable[Figure]) -> str:
    """Return figures beside or below each other, as there is room."""
    parts = "\n".join(f"<figure>{as_svg(figure)}</figure>" for figure in shown)
    return f'<div class="figures">\n{parts}\n</div>\n'


def preformatted(text: str) -> str:
    """Return text as it is."""
    return f"<pre>{html.escape(text)}</pre>\n"


def _words(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
