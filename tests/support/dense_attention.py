"""Attention as plain XLA computes it in the inputs' dtype: its error bounds what an implementation may have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def dense_attention(
    query: Array,
    key: Array,
    value: Array,
    depth_key: Array,
    depth_value: Array,
    visible: np.ndarray,
    filled: np.ndarray,
    scale: float,
) -> tuple[Array, Array]:
    """(out, lse) as plain XLA computes them in the inputs' dtype: narrow products, float32 accumulation and softmax.

    visible: [B, T, U] bool; filled: [S] bool. Unfilled slots have to be finite here.
    """
    batch, tokens, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    grouped = query.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    sequence = jnp.einsum("btkgh,bukh->btkgu", grouped, key, preferred_element_type=jnp.float32)
    depth = jnp.einsum("btkgh,btskh->btkgs", grouped, depth_key, preferred_element_type=jnp.float32)
    mask = np.concatenate([visible, np.broadcast_to(filled, (batch, tokens, filled.size))], axis=-1)
    logits = jnp.where(mask[:, :, None, None], jnp.concatenate([sequence, depth], axis=-1) * scale, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    out = jnp.einsum("btkgu,bukh->btkgh", weights[..., :keys], value, preferred_element_type=jnp.float32)
    out += jnp.einsum("btkgs,btskh->btkgh", weights[..., keys:], depth_value, preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return out.reshape(query.shape).astype(query.dtype), lse.reshape(query.shape[:3])
