"""Tests marked `gpu` are skipped, with a reason, where JAX sees no NVIDIA GPU.

On a CPU every program is compiled as `support.quick_compile` says, also those of processes that tests start: most of
the suite's time is compilation. The flags have to stand in the environment before JAX meets a device.
"""

import os
from pathlib import Path

from support.quick_compile import QUICK_XLA_FLAGS

if not Path("/dev/nvidiactl").exists():
    os.environ["XLA_FLAGS"] = f"{QUICK_XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()  # the last of a name holds

import jax
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason=f"needs an NVIDIA GPU; JAX runs on {jax.default_backend()} here")
        for item in marked:
            item.add_marker(skip)
