"""The parts of a layer that know nothing of attention: projections, RMSNorm, rotary embedding, SwiGLU, embedding.

Axes: B batch, T tokens, D model width, F FFN hidden, N query heads, K key/value heads, H head_dim, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.model.precision import contract
from moda_jax.parallel import vocabulary
from moda_jax.parallel.mesh import current_mesh

Array = jax.Array


class Projection(nnx.Module):
    """A linear map without bias, as one einsum: `y = einsum(spec, x, kernel)`.

    Args:
        spec: the einsum, e.g. "btd,dnh->btnh"; the kernel's letters are its second operand.
        shape: shape of the kernel.
        initializer_range: standard deviation of the kernel at the start (normal distribution).
        dtype: compute dtype; the kernel itself is float32.
        out_dtype: dtype of the result; None: the compute dtype.
        rngs: source of the kernel.
    """

    def __init__(
        self,
        spec: str,
        shape: tuple[int, ...],
        *,
        initializer_range: float,
        dtype: jnp.dtype,
        out_dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self.out_dtype = out_dtype
        init = nnx.initializers.normal(initializer_range)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))

    def __call__(self, x: Array) -> Array:
        """The product, in the compute dtype."""
        return contract(self.spec, x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.out_dtype)


class RMSNorm(nnx.Module):
    """`scale * x / sqrt(mean(x^2) + epsilon)` over the last axis, computed in float32, returned in x's dtype."""

    def __init__(self, features: int, *, epsilon: float) -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        """x of any shape [..., features]."""
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (self.scale[...] * (x32 * inverse_rms)).astype(x.dtype)


class HeadsNorm(RMSNorm):
    """OLMo 2's QK-norm: one RMSNorm over a projection's full width, all heads together. x: [B, T, heads, H]."""

    def __init__(self, heads: int, head_dim: int, *, epsilon: float) -> None:
        super().__init__(heads * head_dim, epsilon=epsilon)

    def __call__(self, x: Array) -> Array:
        """x and the result: [B, T, heads, H]."""
        return super().__call__(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))`. x: [B, T, D]."""

    def __init__(self, width: int, hidden: int, *, initializer_range: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        options = {"initializer_range": initializer_range, "dtype": dtype, "rngs": rngs}
        self.gate = Projection("btd,df->btf", (width, hidden), **options)
        self.up = Projection("btd,df->btf", (width, hidden), **options)
        self.down = Projection("btf,fd->btd", (hidden, width), **options)

    def __call__(self, x: Array) -> Array:
        """x and the result: [B, T, D]."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Embedding(nnx.Module):
    """Rows of a table by token id; its transpose is the output projection of a tied model."""

    def __init__(
        self, vocab_size: int, width: int, *, initializer_range: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.dtype = dtype
        init = nnx.initializers.normal(initializer_range)
        self.table = nnx.Param(init(rngs.params(), (vocab_size, width), jnp.float32))

    def __call__(self, tokens: Array) -> Array:
        """tokens [B, T] int32 to [B, T, D] in the compute dtype."""
        if current_mesh() is not None:
            return vocabulary.lookup(self.table[...], tokens, self.dtype)
        return jnp.take(self.table[...], tokens, axis=0).astype(self.dtype)  # [B, T, D]

    def logits(self, x: Array) -> Array:
        """x [B, T, D] times the transposed table: [B, T, V] float32."""
        return contract("btd,vd->btv", x.astype(self.dtype), self.table[...].astype(self.dtype), jnp.float32)


def rotate(x: Array, positions: Array, theta: float) -> Array:
    """Rotary position embedding (RoFormer), pairs (i, i + H/2), angle = position * theta^(-2i/H).

    Args:
        x: [B, T, heads, H], any float dtype.
        positions: [B, T] int32.
        theta: base of the wavelengths.

    Returns:
        [B, T, heads, H] in x's dtype; computed in float32.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)  # [H/2]
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
