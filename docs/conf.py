"""Sphinx's settings: `python -m sphinx -W docs build/docs` makes a site of the pages beside this file."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # api.md shows the docstrings of this tree

project = "MoDA-JAX"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["tasks"]
myst_heading_anchors = 3  # a link to a heading works here as where pages are read as files
default_role = "code"  # of the docstrings' backquotes
autodoc_class_signature = "mixed"
autodoc_typehints = "signature"
napoleon_use_ivar = True
napoleon_use_rtype = False
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px"}


def _stars_and_bars_are_text(app, what, name, obj, options, lines):
    """A star or a bar of a docstring is itself, as in |lse|; reStructuredText would read it as markup."""
    text = re.sub(r"`[^`]*`|[*|]", lambda found: found[0] if found[0][0] == "`" else "\\" + found[0], "\n".join(lines))
    lines[:] = text.split("\n")


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _stars_and_bars_are_text, priority=400)  # before napoleon's own markup
