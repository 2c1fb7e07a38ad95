"""How the suite runs: on how many processes, with which compiler options, and what it shares.

Most of its time is compilation. On a CPU every program is compiled as `support.quick_compile` says, also those of
processes that tests start, and a program that several of them compile is compiled once: they share a cache, which ends
with the session. `JAX_COMPILATION_CACHE_DIR` names another one, to be kept.

XLA gets more threads than there are cores, where these are few: the interpreter of the GPU kernels blocks a thread of
XLA's for every warpgroup that waits at a barrier, and with two threads in all it was seen to hang. All of this has to
stand in the environment before JAX is imported or meets a device.

Tests marked `gpu` are skipped, with a reason, where JAX sees no NVIDIA GPU. Those marked `slow` are deselected unless
`-m` says otherwise (pyproject.toml). Those marked `precise` too, some of the slow ones, come near to their bounds, and
are compiled with XLA's own emitters; the others in half of that time: `-m "slow and not precise"`, then `-m precise`.
"""

import atexit
import collections
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.quick_compile import NO_MLIR_XLA_FLAGS, QUICK_XLA_FLAGS

XLA_THREADS = 6  # a kernel of three warpgroups, whoever waits for it, and two to spare
MOST_WORKERS = 8  # each holds up to 2 GB
SLOW_TIMEOUT = 1800  # seconds, where the machine has other work too
# Files with few tests, some of which take long: given out first, so that no worker is left alone with one at the end.
FIRST = (
    "tests/safety/test_soak.py",
    "tests/moda_jax/parallel/test_sharded_training.py",
    "tests/moda_jax/model/depth/test_training.py",
    "tests/pallas_kernels/mosaic_gpu/test_composition.py",
    "tests/test_train_script.py",
    "tests/test_evaluate_script.py",
    "tests/test_document_commands.py",
    "tests/safety/test_kills.py",
)
HAS_GPU = Path("/dev/nvidiactl").exists()


def _share_compiled_programs() -> None:
    """In the process that the user started; its workers and all that tests start inherit the environment."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = tempfile.mkdtemp(prefix="moda_jax_tests_compiled_")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def _precise_tests_are_wanted(command: str) -> bool:
    """Those marked `precise` are slow ones, too."""
    return "not precise" not in command and ("slow" in command or "precise" in command)


if not HAS_GPU:
    os.environ.setdefault("NPROC", str(max(XLA_THREADS, os.cpu_count() or 1)))  # XLA's name for it
    if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker inherits them
        flags = QUICK_XLA_FLAGS if _precise_tests_are_wanted(" ".join(sys.argv)) else NO_MLIR_XLA_FLAGS
        os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()  # the last of a name holds
    _share_compiled_programs()

import jax  # noqa: E402  reads the environment
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker per core; none, so that all runs in this process, on a GPU or for a single file."""
    names = [argument.partition("::")[0] for argument in config.args]
    if HAS_GPU or (len(set(names)) == 1 and names[0].endswith(".py")):
        return 0
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _put_long_files_first(items)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason=f"needs an NVIDIA GPU; JAX runs on {jax.default_backend()} here")
        for item in marked:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What stands now stays: looking through it again and again for garbage took 6 % of the processor's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _put_long_files_first(items: list[pytest.Item]) -> None:
    """Behind `FIRST` the files with the most tests lead."""
    files = [item.nodeid.partition("::")[0] for item in items]
    counts = collections.Counter(files)
    places = {file: i for i, file in enumerate(FIRST)}
    order = {file: (places.get(file, len(FIRST)), -count, file) for file, count in counts.items()}
    items.sort(key=lambda item: order[item.nodeid.partition("::")[0]])


@pytest.fixture
def no_shared_programs() -> Iterator[None]:
    """For tests of compiling itself: every program is compiled where it is asked for."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
