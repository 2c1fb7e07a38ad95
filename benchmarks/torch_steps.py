"""Times train steps of PyTorch: what every peer shares. Nothing here imports JAX: the interpreter may be another's."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any


def timed_steps(step: Callable[[], Any], request: dict[str, Any]) -> dict[str, Any]:
    """Runs steps on the GPU, three that do not count first.

    Args:
        step: a train step; returns its loss.
        request: `steps` of a round, `rounds`.

    Returns:
        Seconds of a step, a mean for each round; seconds until the third step had ended, peak memory, the last loss,
        the device.
    """
    import torch

    began = time.perf_counter()
    for _ in range(3):
        loss = step()
    torch.cuda.synchronize()
    compile_seconds = time.perf_counter() - began
    times = []
    for _ in range(request["rounds"]):
        began = time.perf_counter()
        for _ in range(request["steps"]):
            loss = step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / request["steps"])
    return {
        "seconds_per_step": times,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "compile_seconds": compile_seconds,
        "loss": float(loss.detach()),
        "device": torch.cuda.get_device_name(),
    }


def serve(description: str, versions: Callable[[], str], run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The command line of a peer: with --check prints versions, else reads a request and prints its result.

    Args:
        description: for --help.
        versions: of what is needed; raises ModuleNotFoundError where something is missing.
        run: request -> result.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="only say what is installed")
    arguments = parser.parse_args()
    try:
        found = versions()
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed in {sys.executable}")
    print(found if arguments.check else json.dumps({"versions": found} | run(json.load(sys.stdin))))
