"""The dtype policy: what is computed in which precision. Nothing else decides about it.

Parameters are float32. Activations and matrix products are in the compute dtype; softmax, norms, rotary angles, logits
and the loss are float32 whatever the compute dtype is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def compute_dtype(name: jnp.dtype | str | None) -> jnp.dtype:
    """The dtype of activations: as named, or by the default device: bfloat16 on a GPU, float32 elsewhere."""
    if name is None:
        name = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    return jnp.dtype(name)


def dot_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Float32 products are true float32 (never TF32); narrower dtypes use their native matrix units."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def contract(spec: str, a: jax.Array, b: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """`einsum(spec, a, b)` of two arrays of one dtype, result in `out_dtype` (default: theirs).

    Matrix units accumulate in float32; a result in a narrow dtype is rounded once at the end.
    """
    return jnp.einsum(spec, a, b, precision=dot_precision(a.dtype), preferred_element_type=out_dtype or a.dtype)
