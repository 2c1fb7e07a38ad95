"""Training runs in processes of their own that start in a second: forked from one that has imported everything.

    python -m tests.support.run_process     reads a JSON line {"values", "workdir", "log"} per run from stdin, forks,
                                            answers with the process id and, when that process has ended, with its
                                            status (negative: the signal that killed it)

The parent never initialises a JAX backend, so a child is as good as a new process. A persistent compilation cache makes
up for the rest.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CACHE = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


class RunProcesses:
    """Starts runs one after the other; a context manager.

    Args:
        compilation_cache: a directory that the runs share.
        **environment: further variables.
    """

    def __init__(self, compilation_cache: Path, **environment: str):
        self._child: int | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.run_process"], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
            env=os.environ | CACHE | {"JAX_COMPILATION_CACHE_DIR": str(compilation_cache)} | environment,
        )  # fmt: skip

    def start(self, values: Mapping[str, Any], workdir: Path, log: Path, **order: Any) -> int:
        """Starts a run of `values`, see `Config.from_dict`; its output is appended to `log`. Returns its process id.

        `coordinator="ADDRESS:PORT"`: under `jax.distributed`, as a group of one.
        """
        line = json.dumps({"values": values, "workdir": str(workdir), "log": str(log)} | order)
        print(line, file=self._process.stdin, flush=True)
        self._child = int(self._process.stdout.readline())
        return self._child

    def wait(self) -> int:
        """The exit status of the run that was started last, once it has ended."""
        status = int(self._process.stdout.readline())
        self._child = None
        return status

    def __enter__(self) -> RunProcesses:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._child is not None:  # a test has failed in the middle
            os.kill(self._child, signal.SIGKILL)
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)


def _run(order: dict[str, Any]) -> None:
    """In the child: trains, and ends the process without returning."""
    status = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s", force=True)
        logging.getLogger("moda_jax").setLevel(logging.INFO)
        if "coordinator" in order:
            import jax

            jax.distributed.initialize(order["coordinator"], num_processes=1, process_id=0)
        from moda_jax.config import Config
        from moda_jax.training.trainer import TrainingRun

        result = TrainingRun(Config.from_dict(order["values"]), order["workdir"]).train()
        print(result, flush=True)
        status = int(result.exit_code)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401  all that a run imports late

    import moda_jax.training.tensorboard
    import moda_jax.training.trainer  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
