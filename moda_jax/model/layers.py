"""The parts of a layer that know nothing of attention: projections, RMSNorm, rotary embedding, SwiGLU, embedding.

RMSNorm, rotary embedding and SwiGLU have their own backward, for what they keep: autodiff would keep float32
intermediates of the size of the activations, several for each; these keep their input (and a number per token).

Axes: B batch, T tokens, D model width, F FFN hidden, N query heads, K key/value heads, H head_dim, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moda_jax.model.precision import contract
from moda_jax.parallel import vocabulary
from moda_jax.parallel.mesh import constrain, current_mesh
from moda_jax.row_sums import sum_rows

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
        return rms_norm(x, self.scale[...], self.epsilon)


class HeadsNorm(RMSNorm):
    """OLMo 2's QK-norm: one RMSNorm over a projection's full width, all heads together. x: [B, T, heads, H]."""

    def __init__(self, heads: int, head_dim: int, *, epsilon: float) -> None:
        super().__init__(heads * head_dim, epsilon=epsilon)

    def __call__(self, x: Array) -> Array:
        """x and the result: [B, T, heads, H]."""
        return super().__call__(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))`. x: [B, T, D].

    Args:
        width, hidden: D, F.
        keep_hidden: the backward pass finds gate(x) and up(x) [B, T, F] stored, instead of computing them again.
        initializer_range, dtype, rngs: as in `Projection`.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        keep_hidden: bool = True,
        initializer_range: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        options = {"initializer_range": initializer_range, "dtype": dtype, "rngs": rngs}
        self.keep_hidden = keep_hidden
        self.gate = Projection("btd,df->btf", (width, hidden), **options)
        self.up = Projection("btd,df->btf", (width, hidden), **options)
        self.down = Projection("btf,fd->btd", (hidden, width), **options)

    def __call__(self, x: Array) -> Array:
        """x and the result: [B, T, D]."""
        kernels = (p.kernel[...].astype(p.dtype) for p in (self.gate, self.up, self.down))
        return swiglu(self.keep_hidden, x.astype(self.gate.dtype), *kernels)


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
        return take_rows(self.table[...], tokens, self.dtype)  # [B, T, D]

    def logits(self, x: Array) -> Array:
        """x [B, T, D] times the transposed table: [B, T, V] float32."""
        return contract("btd,vd->btv", x.astype(self.dtype), self.table[...].astype(self.dtype), jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def take_rows(table: Array, tokens: Array, dtype: jnp.dtype) -> Array:
    """`table[tokens]` in `dtype`; the table's gradient is summed in a fixed order, see `moda_jax.row_sums`.

    Args:
        table: [V, D] float32.
        tokens: [B, T] int32 in 0..V-1.
        dtype: of the result [B, T, D].
    """
    return jnp.take(table, tokens, axis=0).astype(dtype)


def _take_rows_forward(table: Array, tokens: Array, dtype: jnp.dtype) -> tuple[Array, tuple]:
    return take_rows(table, tokens, dtype), (table, tokens)  # of the table only the shape is needed


def _take_rows_backward(dtype: jnp.dtype, residuals: tuple, dy: Array) -> tuple[Array, np.ndarray]:
    del dtype
    table, tokens = residuals
    gradient = sum_rows(tokens.reshape(-1), dy.reshape(-1, dy.shape[-1]), table.shape[0])
    return gradient.astype(table.dtype), np.zeros(tokens.shape, jax.dtypes.float0)


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """`scale * x / sqrt(mean(x^2) + epsilon)` over the last axis, computed in float32.

    Args:
        x: [..., D], any float dtype.
        scale: [D] float32.
        epsilon: added to the mean square.

    Returns:
        [..., D] in x's dtype.
    """
    return _rms_norm_forward(x, scale, epsilon)[0]


def _rms_norm_forward(x: Array, scale: Array, epsilon: float) -> tuple[Array, tuple]:
    wide = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)  # [..., 1]
    return (scale * (wide * inverse_rms)).astype(x.dtype), (x, scale, inverse_rms)


def _rms_norm_backward(epsilon: float, residuals: tuple, dy: Array) -> tuple[Array, Array]:
    """With n = x / rms: dx = (g - n mean(g n)) / rms, g = scale dy."""
    del epsilon
    x, scale, inverse_rms = residuals
    normed = x.astype(jnp.float32) * inverse_rms
    wide = dy.astype(jnp.float32)
    g = scale * wide
    dx = inverse_rms * (g - normed * jnp.mean(g * normed, axis=-1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(wide * normed, axis=tuple(range(x.ndim - 1)))


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def swiglu(keep_hidden: bool, x: Array, gate: Array, up: Array, down: Array) -> Array:
    """`(silu(x gate) * (x up)) down`.

    Args:
        keep_hidden: keep `x gate` and `x up` for the backward pass, 2 F numbers a token; else they are computed again.
        x: [B, T, D].
        gate, up: [D, F], x's dtype.
        down: [F, D], x's dtype.

    Returns:
        [B, T, D] in x's dtype.
    """
    return _swiglu_forward(keep_hidden, x, gate, up, down)[0]


def _hidden(x: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    axes = ("batch", "tokens", "ffn")
    return (
        constrain(contract("btd,df->btf", x, gate), *axes),
        constrain(contract("btd,df->btf", x, up), *axes),
    )


def _swiglu_forward(keep_hidden: bool, x: Array, gate: Array, up: Array, down: Array) -> tuple[Array, tuple]:
    hidden = _hidden(x, gate, up)
    y = contract("btf,fd->btd", jax.nn.silu(hidden[0]) * hidden[1], down)
    return y, (x, gate, up, down, hidden if keep_hidden else None)


def _swiglu_backward(keep_hidden: bool, residuals: tuple, dy: Array) -> tuple[Array, Array, Array, Array]:
    """With s = sigmoid(a), a = x gate, b = x up: d silu(a) / da = s (1 + a (1 - s))."""
    del keep_hidden
    x, gate, up, down, hidden = residuals
    a, b = (h.astype(jnp.float32) for h in (_hidden(x, gate, up) if hidden is None else hidden))
    dproduct = contract("btd,fd->btf", dy, down).astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(a)
    silu = a * sigmoid
    da = (dproduct * b * sigmoid * (1.0 + a * (1.0 - sigmoid))).astype(x.dtype)
    db = (dproduct * silu).astype(x.dtype)
    product = (silu * b).astype(x.dtype)
    dx = contract("btf,df->btd", da, gate) + contract("btf,df->btd", db, up)
    return (
        dx,
        contract("btd,btf->df", x, da),
        contract("btd,btf->df", x, db),
        contract("btf,btd->fd", product, dy),
    )


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rotate(x: Array, positions: Array, theta: float) -> Array:
    """Rotary position embedding (RoFormer), pairs (i, i + H/2), angle = position * theta^(-2i/H).

    Args:
        x: [B, T, heads, H], any float dtype.
        positions: [B, T] int32.
        theta: base of the wavelengths.

    Returns:
        [B, T, heads, H] in x's dtype; computed in float32.
    """
    return _rotated(x, positions, theta, 1.0)


def _rotated(x: Array, positions: Array, theta: float, direction: float) -> Array:
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)  # [H/2]
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angle), direction * jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _rotate_forward(x: Array, positions: Array, theta: float) -> tuple[Array, Array]:
    return _rotated(x, positions, theta, 1.0), positions


def _rotate_backward(theta: float, positions: Array, dy: Array) -> tuple[Array, np.ndarray]:
    """A rotation's transpose is the rotation back."""
    return _rotated(dy, positions, theta, -1.0), np.zeros(positions.shape, jax.dtypes.float0)


rotate.defvjp(_rotate_forward, _rotate_backward)
