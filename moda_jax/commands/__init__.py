"""The commands of the project: their flags, and the functions behind `moda-train` and `train.py`, and so on.

Every module here has `main`, which a console script and the script at the repository's top level both call, and
`FLAGS`, the command's own flags. `--help` shows the module's docstring and what the flags say of themselves.
"""
