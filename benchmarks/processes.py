"""Measurements in processes of their own: a case of a benchmark, and a peer in another interpreter.

A peak of memory belongs to one process, what does not fit ends nothing but itself, and JAX and PyTorch do not hold
a GPU's memory at the same time. A process answers with one line of JSON, its last.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CHILD = "BENCHMARK_CHILD"  # an environment variable: this process measures the one case of its command line
_ROOT = Path(__file__).parent.parent


def is_child() -> bool:
    """Whether this process is to measure."""
    return bool(os.environ.get(CHILD))


def run_case(module: str, case: str, argv: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """The case's result, or {"case", "error"} where it ran out of memory or failed; what it said goes to stderr.

    Args:
        module: `python -m` of it, with `argv` and `CHILD` set, measures the case.
        case: its name.
        argv: arguments, the one that names the case among them.
        environment: variables to set.
    """
    command = [sys.executable, "-m", module, *argv]
    set_here = os.environ | {CHILD: "1"} | (environment or {})
    done = subprocess.run(command, env=set_here, capture_output=True, text=True, check=False)
    return _answer(done, case)


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another framework's train step.

    Attributes:
        module: a script that `torch_steps.serve` makes.
        needs: what the interpreter has to have, in words.
    """

    module: str
    needs: str

    def check(self, python: str) -> str:
        """Versions of what the peer needs.

        Raises:
            ValueError: the interpreter cannot run it; the message says what it lacks.
        """
        expected = f"expected a Python with {self.needs}"
        try:
            done = self._start(python, ["--check"])
        except OSError as error:
            raise ValueError(f"--peer={python}: {error.strerror}; {expected}") from error
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it failed"])[-1]
            raise ValueError(f"--peer={python}: {reason}; {expected}")
        return done.stdout.strip()

    def run(self, python: str, case: str, request: dict[str, Any]) -> dict[str, Any]:
        """What the peer answers, and "case"; or {"case", "error"}, as of `run_case`."""
        return _answer(self._start(python, [], json.dumps(request)), case)

    def _start(self, python: str, argv: list[str], request: str = "") -> subprocess.CompletedProcess:
        paths = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        command, environment = [python, "-m", self.module, *argv], os.environ | {"PYTHONPATH": paths}
        return subprocess.run(command, env=environment, input=request, capture_output=True, text=True, check=False)


def _answer(done: subprocess.CompletedProcess, case: str) -> dict[str, Any]:
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line or "RESOURCE_EXHAUSTED" in line]
        print(done.stderr[-2000:], file=sys.stderr)
        return {"case": case, "error": (errors or done.stderr.splitlines() or ["?"])[-1][:200]}
    return {"case": case} | json.loads(done.stdout.splitlines()[-1])
