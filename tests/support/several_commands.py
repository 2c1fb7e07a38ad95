"""Runs commands one after the other, each as a process of its own: `python -m support.several_commands FILE.json`.

FILE.json is a list of argument lists, as they stand behind `python`. Each runs in a fork of this process, which has
imported what they all import: that is most of a short command's time. The first that fails ends it with exit code 1.
"""

from __future__ import annotations

import json
import multiprocessing
import runpy
import sys
from pathlib import Path

import moda_jax.inference.evaluation
import moda_jax.interop.start
import moda_jax.training.trainer  # noqa: F401  for the forks


def run(arguments: list[str]) -> None:
    """`python ARGUMENTS`, in this process."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def main(file: Path) -> int:
    """All of the file's."""
    fork = multiprocessing.get_context("fork")
    for arguments in json.loads(file.read_text()):
        print(f"$ python {' '.join(arguments)}", file=sys.stderr, flush=True)
        process = fork.Process(target=run, args=(arguments,))
        process.start()
        process.join()
        if process.exitcode:
            print(f"exit code {process.exitcode}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
