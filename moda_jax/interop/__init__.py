"""Weights from and to other libraries' files."""

from moda_jax.interop.olmo2 import load_olmo2

__all__ = ["load_olmo2"]
