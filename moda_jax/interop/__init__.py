"""Weights from and to other libraries' files."""

from moda_jax.interop.deit import load_deit
from moda_jax.interop.exchange import export_model, load_model
from moda_jax.interop.olmo2 import load_olmo2

__all__ = ["export_model", "load_deit", "load_model", "load_olmo2"]
