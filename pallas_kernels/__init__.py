"""Mixture-of-depths attention as a JAX op: validation, dispatch, and its implementations; RMSNorm's backward (norm.py).
Knows nothing of Flax."""

from pallas_kernels.api import depth_attention, moda_attention

__all__ = ["depth_attention", "moda_attention"]
