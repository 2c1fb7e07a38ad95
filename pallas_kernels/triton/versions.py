"""The one pair of jax-triton and Triton with which the kernels are tested; others are refused by their numbers."""

from __future__ import annotations

import importlib.metadata
import re

JAX_TRITON = "0.3.1"
TRITON = "3.6"
EXTRA = "pip install 'moda-jax[triton]'"


def check() -> None:
    """Raises NotImplementedError unless the supported pair is installed; the message says what is there."""
    jax_triton, triton = _installed("jax-triton"), _installed("triton")
    if None in (jax_triton, triton):
        missing = " and ".join(
            name for name, version in (("jax-triton", jax_triton), ("triton", triton)) if version is None
        )
        raise NotImplementedError(f"implementation='triton' needs {missing}, which is not installed: {EXTRA}")
    if jax_triton != JAX_TRITON or not re.match(re.escape(TRITON) + r"(\.|$)", triton):
        raise NotImplementedError(
            f"implementation='triton' is tested with jax-triton {JAX_TRITON} and triton {TRITON}, and here are "
            f"jax-triton {jax_triton} and triton {triton}: {EXTRA}"
        )


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
