"""The process before JAX meets the device: XLA's flags, the device memory it takes, and the cache of compiled programs.

All of it is set by environment variables and `jax.config`, and nothing that the user has set is changed.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import jax

_logger = logging.getLogger(__name__)

# Flags of XLA for NVIDIA GPUs. None yet: one enters when `python -m benchmarks.training` has shown what it is worth.
XLA_GPU_FLAGS: tuple[str, ...] = ()
# No atomic sums and no algorithms of cuBLAS that differ from run to run. Which algorithm is taken is still measured
# when a program is compiled: two runs are bit-equal if they share the compiled program, through the cache below.
DETERMINISTIC_FLAGS = ("--xla_gpu_exclude_nondeterministic_ops=true",)
# The share of a GPU's memory that is taken at the start; JAX's own 0.75 leaves 20 of 80 GB unused.
MEMORY_FRACTION = "0.92"


def prepare(cache_directory: Path, *, deterministic: bool = False) -> None:
    """Sets the flags, the memory share and the compilation cache; call it before anything touches a device.

    Args:
        cache_directory: compiled programs go to `compiled/` in it, so that the next start of the same run compiles
            nothing.
        deterministic: `train.deterministic`.
    """
    given = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.split("=")[0] for flag in given}
    wanted = XLA_GPU_FLAGS + (DETERMINISTIC_FLAGS if deterministic else ())
    added = [flag for flag in wanted if flag.split("=")[0] not in names]
    if _may_have_gpu():
        os.environ["XLA_FLAGS"] = " ".join([*given, *added])
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)
        _logger.info("XLA flags %s", os.environ["XLA_FLAGS"] or "(none)")
    if jax.config.jax_compilation_cache_dir is None:
        directory = cache_directory / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(directory))
    _logger.info("compiled programs are kept in %s", jax.config.jax_compilation_cache_dir)


def require_device() -> None:
    """Meets the device; call it after `prepare`.

    Raises:
        ValueError: there is no device of the platform that JAX_PLATFORMS names.
    """
    platforms = jax.config.jax_platforms
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts where a platform's plug-in is not installed
        if not platforms:
            raise
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise ValueError(
            f"JAX_PLATFORMS={platforms!r}: JAX finds no such device{reason}; unset it to take what is there, or see "
            'to the driver and to JAX\'s GPU part (python -m pip install "moda-jax[cuda]")'
        ) from error


def _may_have_gpu() -> bool:
    """Whether JAX may find a GPU, without asking it: flags for GPUs are an error where XLA has no GPU part."""
    platforms = jax.config.jax_platforms or os.environ.get("JAX_PLATFORMS", "")
    return Path("/dev/nvidiactl").exists() and (not platforms or "cuda" in platforms or "gpu" in platforms)
