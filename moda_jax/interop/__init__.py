"""Weights from and to other libraries' files."""

from moda_jax.interop.deit import load_deit
from moda_jax.interop.exchange import export_model, load_model
from moda_jax.interop.olmo2 import load_olmo2
from moda_jax.interop.olmo_core import load_olmo_core

__all__ = ["export_model", "load_deit", "load_model", "load_olmo2", "load_olmo_core"]
