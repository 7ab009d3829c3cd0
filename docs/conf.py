"""Sphinx configuration. Build with: python -m sphinx -W docs docs/_build/html."""

import importlib.metadata

project = "optax_lowbit"
author = "The optax_lowbit authors"
copyright = f"2026, {author}"
release = importlib.metadata.version("optax-lowbit")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
# sphinx.ext.intersphinx is left out: the build needs no network.

exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
