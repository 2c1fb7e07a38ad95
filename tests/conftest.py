"""Tests marked `gpu` are skipped, with a reason, where JAX sees no NVIDIA GPU.

On a CPU every program is compiled as `support.quick_compile` says, also those of processes that tests start: most of
the suite's time is compilation. And XLA gets more threads than there are cores, where these are few: the interpreter of
the GPU kernels blocks a thread of XLA's for every warpgroup that waits at a barrier, and with two threads in all it was
seen to hang. Both have to stand in the environment before JAX meets a device.
"""

import os
from pathlib import Path

import jax
import pytest
from support.quick_compile import QUICK_XLA_FLAGS

XLA_THREADS = 6  # a kernel of three warpgroups, whoever waits for it, and two to spare

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("NPROC", str(max(XLA_THREADS, os.cpu_count() or 1)))  # XLA's name for it
    os.environ["XLA_FLAGS"] = f"{QUICK_XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()  # the last of a name holds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason=f"needs an NVIDIA GPU; JAX runs on {jax.default_backend()} here")
        for item in marked:
            item.add_marker(skip)
