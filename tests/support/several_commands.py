"""Runs commands one after the other, each as a process of its own.

    python -m support.several_commands FILE.json                the first that fails ends it with exit code 1
    python -m support.several_commands FILE.json DIRECTORY      all; what command N prints stands in N.out and N.err of
                                                                the directory, its exit code in N.code

FILE.json is a list of argument lists, as they stand behind `python`. Each runs in a fork of this process, which has
imported what they all import: that is most of a short command's time. With a directory that is what others wrote, so
that our own modules are imported as `python` would.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

OURS = ("moda_jax.inference.evaluation", "moda_jax.interop.start", "moda_jax.training.trainer")
OTHERS = ("flax.nnx", "grain", "matplotlib.pyplot", "ml_collections", "optax", "orbax.checkpoint")


def run(arguments: list[str]) -> None:
    """`python ARGUMENTS`, in this process."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def run_printing_to(stem: Path, arguments: list[str]) -> None:
    """`run`, with what is printed in files."""
    for descriptor, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(stem.with_suffix(end), os.O_WRONLY | os.O_CREAT), descriptor)
    run(arguments)


def ended(function, *arguments) -> int:
    """The exit code of a fork that calls the function."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def main(file: Path, directory: Path | None = None) -> int:
    """All of the file's."""
    for name in OURS if directory is None else OTHERS:
        importlib.import_module(name)
    for i, arguments in enumerate(json.loads(file.read_text())):
        if directory is not None:
            stem = directory / str(i)
            stem.with_suffix(".code").write_text(str(ended(run_printing_to, stem, arguments)))
            continue
        print(f"$ python {' '.join(arguments)}", file=sys.stderr, flush=True)
        if code := ended(run, arguments):
            print(f"exit code {code}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*map(Path, sys.argv[1:])))
