"""The parts of a layer that know nothing of attention: projections, norms, FFNs, embedding.

The norms have their own backward, for what they keep: autodiff would keep float32 intermediates of the size of the
activations, several for each; these keep their input.

Axes: B batch, T tokens, D model width, F FFN hidden, N query heads, K key/value heads, H head_dim, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moda_jax.model.activations import biased_gelu, gelu, swiglu
from moda_jax.model.initial_keys import InitialKeys
from moda_jax.model.rotary import norm_rotate
from moda_jax.numerics.precision import contract
from moda_jax.numerics.row_sums import sum_rows
from moda_jax.parallel import norm as norms
from moda_jax.parallel import vocabulary
from moda_jax.parallel.manual import varying_like
from moda_jax.parallel.mesh import constrain, current_mesh
from moda_jax.parameter import parameter
from pallas_kernels import norm

Array = jax.Array

# Einsum letters of a kernel, and the logical axes that they stand for.
LETTERS = {
    "d": "width", "n": "heads", "k": "kv_heads", "h": "head_dim", "f": "ffn", "v": "vocabulary", "c": "pair",
}  # fmt: skip


class Projection(nnx.Module):
    """A linear map, as one einsum: `y = einsum(spec, x, kernel)`, plus a bias where it has one.

    Args:
        spec: the einsum, e.g. "btd,dnh->btnh"; the kernel's letters are its second operand.
        shape: shape of the kernel.
        initializer_range: standard deviation of the kernel at the start (normal distribution).
        dtype: compute dtype; the kernel itself is float32.
        out_dtype: dtype of the result; None: the compute dtype.
        axes: logical axes of the kernel; None: those that its letters stand for, see `LETTERS`.
        bias: adds a vector to the result, over the kernel's letters that the result has; 0 at the start, not decayed.
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
        axes: tuple[str | None, ...] | None = None,
        bias: bool = False,
        rngs: nnx.Rngs | InitialKeys,
    ) -> None:
        letters, _, result = spec.split(",")[1].partition("->")
        if axes is None:
            axes = tuple(LETTERS[letter] for letter in letters)
        self.spec = spec
        self.dtype = dtype
        self.out_dtype = out_dtype
        init = nnx.initializers.normal(initializer_range)
        self.kernel = parameter(init(rngs.params(), shape, jnp.float32), *axes, decays=True, is_cast=True)
        kept = [place for place, letter in enumerate(letters) if letter in result]
        zeros = jnp.zeros(tuple(shape[place] for place in kept), jnp.float32)
        self.bias = parameter(zeros, *(axes[place] for place in kept)) if bias else None

    def __call__(self, x: Array) -> Array:
        """The result, in the compute dtype."""
        y = self.without_bias(x)
        return y if self.bias is None else add_to_rows(y, varying_like(self.bias[...], y))

    def without_bias(self, x: Array) -> Array:
        """The einsum alone."""
        return contract(self.spec, x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.out_dtype)


class RMSNorm(nnx.Module):
    """`scale * x / sqrt(mean(x^2) + epsilon)` over the last axis, computed in float32, returned in x's dtype.

    Args:
        features: size of that axis.
        epsilon: added to the mean square.
        implementation: of the backward, see `pallas_kernels.norm`.
        axis: logical axis of the scale.
    """

    def __init__(
        self, features: int, *, epsilon: float, implementation: str | None = None, axis: str = "channels"
    ) -> None:
        self.epsilon = epsilon
        self.implementation = implementation
        self.scale = parameter(jnp.ones((features,), jnp.float32), axis)

    def __call__(self, x: Array) -> Array:
        """x of any shape [..., features]."""
        return rms_norm(x, varying_like(self.scale[...], x), self.epsilon, self.implementation)


class LayerNorm(RMSNorm):
    """`scale * (x - mean) / sqrt(variance + epsilon) + bias` over the last axis; arguments as of `RMSNorm`."""

    def __init__(
        self, features: int, *, epsilon: float, implementation: str | None = None, axis: str = "channels"
    ) -> None:
        super().__init__(features, epsilon=epsilon, implementation=implementation, axis=axis)
        self.bias = parameter(jnp.zeros((features,), jnp.float32), axis)

    def __call__(self, x: Array) -> Array:
        """x of any shape [..., features]."""
        scale, bias = (varying_like(array[...], x) for array in (self.scale, self.bias))
        return layer_norm(x, scale, bias, self.epsilon, self.implementation)


class HeadsNorm(RMSNorm):
    """OLMo 2's QK-norm and what follows it: one RMSNorm over a projection's full width, all heads together, then the
    rotary embedding head by head, if there is one. Its axis ("heads" or "kv_heads") is split head by head."""

    axes: ClassVar[tuple[int, ...]] = (-2, -1)  # of x [B, T, heads, H] that a mean square is taken over

    def __init__(
        self, heads: int, head_dim: int, *, epsilon: float, implementation: str | None = None, axis: str = "heads"
    ) -> None:
        super().__init__(heads * head_dim, epsilon=epsilon, implementation=implementation, axis=axis)

    def __call__(self, x: Array, positions: Array, theta: float | None) -> Array:
        """x and the result [B, T, heads, H]; positions, theta: as in `rotate`; theta None: no rotation."""
        if theta is None:
            return super().__call__(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)
        scale = varying_like(self.scale[...], x).reshape(x.shape[-2:])
        return norm_rotate(x, scale, positions, self.epsilon, theta, self.implementation)

    def without_scale(self, x: Array) -> Array:
        """x [B, T, heads, H] over its root mean square, in x's dtype; not rotated."""
        wide = x.astype(jnp.float32)
        return (wide * norm.inverse_rms(wide, self.axes, self.epsilon)).astype(x.dtype)

    def scale_of_heads(self, heads: int) -> Array:
        """The scale as [heads, H]; [1, H] where all heads share it."""
        return self.scale[...].reshape(heads, -1)


class PerHeadNorm(HeadsNorm):
    """QK-norm per head, and what follows it: an RMSNorm over every head's own H channels, with one scale for all."""

    axes: ClassVar[tuple[int, ...]] = (-1,)

    def __init__(self, head_dim: int, *, epsilon: float, implementation: str | None = None) -> None:
        super().__init__(1, head_dim, epsilon=epsilon, implementation=implementation, axis="head_dim")

    def __call__(self, x: Array, positions: Array, theta: float | None) -> Array:
        """x and the result [B, T, heads, H]; positions, theta: as in `rotate`; theta None: no rotation."""
        return norm_rotate(x, varying_like(self.scale[...], x), positions, self.epsilon, theta, self.implementation)

    def scale_of_heads(self, heads: int) -> Array:
        """[1, H]."""
        del heads
        return self.scale[...][None]


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))`. x: [B, T, D].

    Args:
        width, hidden: D, F.
        keep_hidden: the backward pass finds gate(x), up(x) and their product [B, T, F] stored, instead of computing
            them again.
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
        rngs: nnx.Rngs | InitialKeys,
    ) -> None:
        keys = InitialKeys.of(rngs)
        options = {"initializer_range": initializer_range, "dtype": dtype}
        self.keep_hidden = keep_hidden
        self.gate = Projection("btd,df->btf", (width, hidden), **options, rngs=keys.at("gate"))
        self.up = Projection("btd,df->btf", (width, hidden), **options, rngs=keys.at("up"))
        self.down = Projection("btf,fd->btd", (hidden, width), **options, rngs=keys.at("down"))

    def __call__(self, x: Array) -> Array:
        """x and the result: [B, T, D]."""
        kernels = (varying_like(p.kernel[...].astype(p.dtype), x) for p in (self.gate, self.up, self.down))
        return swiglu(self.keep_hidden, x.astype(self.gate.dtype), *kernels)


class GELUNetwork(nnx.Module):
    """The feed-forward network of a vision transformer: `gelu(x up) down`, GELU with the normal distribution itself.

    Args:
        width, hidden: D, F.
        keep_hidden: keep what stands between the matrix products for the backward pass, 2 F numbers a token; else it
            is computed again.
        bias: both projections have one.
        implementation: of GELU's backward where there is a bias, see `pallas_kernels.biased_gelu`.
        initializer_range, dtype, rngs: as in `Projection`.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        keep_hidden: bool = True,
        bias: bool = False,
        implementation: str | None = None,
        initializer_range: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs | InitialKeys,
    ) -> None:
        keys = InitialKeys.of(rngs)
        options = {"initializer_range": initializer_range, "dtype": dtype, "bias": bias}
        self.keep_hidden = keep_hidden
        self.implementation = implementation
        self.up = Projection("btd,df->btf", (width, hidden), **options, rngs=keys.at("up"))
        self.down = Projection("btf,fd->btd", (hidden, width), **options, rngs=keys.at("down"))

    def __call__(self, x: Array) -> Array:
        """x and the result: [B, T, D]."""
        graph, params = nnx.split(self)

        def run(params: nnx.State, x: Array) -> Array:
            module = nnx.merge(graph, params)
            hidden, bias = constrain(module.up.without_bias(x), "batch", "tokens", "ffn"), module.up.bias
            if bias is None:
                return module.down(gelu(hidden))
            return module.down(biased_gelu(hidden, varying_like(bias[...], hidden), module.implementation))

        return (run if self.keep_hidden else jax.checkpoint(run))(params, x)


class Embedding(nnx.Module):
    """Rows of a table by token id; its transpose is the output projection of a tied model."""

    def __init__(
        self, vocab_size: int, width: int, *, initializer_range: float, dtype: jnp.dtype, rngs: nnx.Rngs | InitialKeys
    ) -> None:
        self.dtype = dtype
        init = nnx.initializers.normal(initializer_range)
        table = init(rngs.params(), (vocab_size, width), jnp.float32)
        self.table = parameter(table, "vocabulary", "width", is_cast=True)

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
    """`table[tokens]` in `dtype`; the table's gradient is summed in a fixed order, see `moda_jax.numerics.row_sums`.

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(x: Array, scale: Array, epsilon: float, implementation: str | None = None) -> Array:
    """`scale * x / sqrt(mean(x^2) + epsilon)` over the last axis, computed in float32.

    Args:
        x: [..., D], any float dtype.
        scale: [D], any float dtype.
        epsilon: added to the mean square.
        implementation: of the backward, see `pallas_kernels.norm`.

    Returns:
        [..., D] in x's dtype.
    """
    wide = x.astype(jnp.float32)
    return (norm.over_rows(scale, wide) * (wide * norm.inverse_rms(wide, -1, epsilon))).astype(x.dtype)


def _rms_norm_forward(x: Array, scale: Array, epsilon: float, implementation: str | None = None) -> tuple[Array, tuple]:
    # The rms is not kept: with y as its only result the forward is one kernel on a GPU, and for the backward another
    # sum over what it reads anyway costs nothing.
    return rms_norm(x, scale, epsilon, implementation), (x, scale)


def _rms_norm_backward(epsilon: float, implementation: str | None, residuals: tuple, dy: Array) -> tuple[Array, Array]:
    x, scale = residuals
    return norms.rms_norm_backward(x, dy, scale, epsilon=epsilon, implementation=implementation)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float, implementation: str | None = None) -> Array:
    """`scale * (x - mean(x)) / sqrt(variance(x) + epsilon) + bias` over the last axis, computed in float32.

    Args:
        x: [..., D], any float dtype.
        scale, bias: [D], any float dtype.
        epsilon: as in `rms_norm`.
        implementation: of the forward and the backward, see `pallas_kernels.layer_norm`.

    Returns:
        [..., D] in x's dtype.
    """
    return norms.layer_norm(x, scale, bias, epsilon=epsilon, implementation=implementation)


def _layer_norm_forward(
    x: Array, scale: Array, bias: Array, epsilon: float, implementation: str | None = None
) -> tuple[Array, tuple]:
    return layer_norm(x, scale, bias, epsilon, implementation), (x, scale, bias)


def _layer_norm_backward(
    epsilon: float, implementation: str | None, residuals: tuple, dy: Array
) -> tuple[Array, Array, Array]:
    x, scale, bias = residuals
    dx, dscale, dbias = norms.layer_norm_backward(x, dy, scale, epsilon=epsilon, implementation=implementation)
    return dx, dscale.astype(scale.dtype), dbias.astype(bias.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def add_to_rows(x: Array, vector: Array) -> Array:
    """`x + vector` for every row of x. The vector's gradient is a sum over all rows: in float32, whatever x is.

    Args:
        x: [..., *vector.shape], any float dtype.
        vector: float32.

    Returns:
        x's shape and dtype; the vector is rounded to it first.
    """
    return x + norm.over_rows(vector, x).astype(x.dtype)


def _add_to_rows_forward(x: Array, vector: Array) -> tuple[Array, Array]:
    return add_to_rows(x, vector), vector


def _add_to_rows_backward(vector: Array, dy: Array) -> tuple[Array, Array]:
    rows = tuple(range(dy.ndim - vector.ndim))
    return dy, jnp.sum(dy.astype(jnp.float32), axis=rows).astype(vector.dtype)


add_to_rows.defvjp(_add_to_rows_forward, _add_to_rows_backward)
