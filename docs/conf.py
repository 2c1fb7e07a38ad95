"""Sphinx's settings: `python -m sphinx -W docs build/docs` makes a site of the pages beside this file."""

project = "MoDA-JAX"
extensions = ["myst_parser"]
exclude_patterns = ["tasks"]
myst_heading_anchors = 3  # a link to a heading works here as where pages are read as files
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px"}
