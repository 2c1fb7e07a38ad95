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
html_theme_options = {"page_width": "1240px", "body_max_width": "none", "code_font_size": "0.78em"}
html_show_copyright = False


def _every_name_has_its_line(app, what, name, obj, options, lines):
    """Of "a, b: meaning" under Attributes napoleon makes a name and its type: each name gets the meaning."""
    section, names, meaning, found = None, [], [], []
    for line in [*lines, "end"]:
        if names and not line.startswith("     "):  # the meaning of several names ends here
            found += [row for one in names for row in (f"    {one}: {meaning[0]}", *meaning[1:])]
            names = []
        if line and not line.startswith(" "):
            section = line
        several = re.fullmatch(r"    (\w+(?:, \w+)+): (.*)", line) if section == "Attributes:" else None
        if several:
            names, meaning = several[1].split(", "), [several[2]]
        elif names:
            meaning.append(line)
        else:
            found.append(line)
    lines[:] = found[:-1]


def _stars_and_bars_are_text(app, what, name, obj, options, lines):
    """A star or a bar of a docstring is itself, as in |lse|; reStructuredText would read it as markup."""
    text = re.sub(r"`[^`]*`|[*|]", lambda found: found[0] if found[0][0] == "`" else "\\" + found[0], "\n".join(lines))
    lines[:] = text.split("\n")


def _formulas_keep_their_lines(app, what, name, obj, options, lines):
    """What a docstring indents outside of its sections is formulas: one stays under the other."""
    section = None
    for i, line in enumerate(lines):
        if line and not line.startswith(" "):
            section = line if line in ("Args:", "Attributes:", "Returns:", "Raises:", "Yields:") else None
        elif line and section is None:
            lines[i] = f"    | {line.strip()}"


def _functions_by_name(app, what, name, obj, options, signature, returns):
    """A default that is a function is shown by its name: the signature is then Python, and its types are short."""
    if not signature:
        return None
    signature = re.sub(r"<function [^ >]*<lambda>[^>]*>", "...", signature)
    return re.sub(r"<function ([\w.]+)[^>]*>", r"\1", signature), returns


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", _functions_by_name)
    app.connect("autodoc-process-docstring", _every_name_has_its_line, priority=300)
    app.connect("autodoc-process-docstring", _formulas_keep_their_lines, priority=450)
    app.connect("autodoc-process-docstring", _stars_and_bars_are_text, priority=400)  # before napoleon's own markup
