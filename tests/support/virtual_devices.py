"""Runs a module of `support` in a process of its own, where JAX sees several CPU devices.

The number of devices is fixed when JAX starts, so a test process with one device cannot do it itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.quick_compile import QUICK_XLA_FLAGS

ROOT = Path(__file__).parents[2]


def environment(devices: int) -> dict[str, str]:
    """The variables of such a process."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    # Compiling dominates: it is done as in the process that asks (conftest.py).
    flags = f"{os.environ.get('XLA_FLAGS', QUICK_XLA_FLAGS)} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"PYTHONPATH": path, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def run_module(module: str, *arguments: object, devices: int = 8, timeout: float = 1500) -> str:
    """Runs `python -m module arguments` and returns its stdout; an AssertionError with its stderr if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=environment(devices), cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout
