"""Sphinx's settings: `python -m sphinx -W docs build/docs` makes a site of the pages beside this file."""

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
