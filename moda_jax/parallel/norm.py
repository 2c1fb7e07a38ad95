"""What goes over rows, on the mesh: every device runs `pallas_kernels` on its own rows, under `shard_map`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from moda_jax.parallel.mesh import RULES, current_mesh, partition_spec
from pallas_kernels import biased_gelu, norm
from pallas_kernels import layer_norm as layer_norms

Array = jax.Array

_TOKEN_AXES = (*RULES["batch"], *RULES["tokens"])  # the mesh axes that rows are split over


def rms_norm_backward(
    x: Array,
    dy: Array,
    scale: Array,
    rotation: tuple[Array, Array] | None = None,
    *,
    epsilon: float,
    per_head: bool = False,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """`pallas_kernels.norm.rms_norm_backward` of x [B, T, *scale.shape], or `per_head` [B, T, heads, H] with a scale
    [H], on the current mesh or without one.

    Where heads that are normed together are split over `tensor`, their sums cross devices: there it is left to XLA's
    partitioner. Heads that are normed each by itself stay where they are.
    """
    mesh = current_mesh()
    if mesh is None:
        return norm.rms_norm_backward(x, dy, scale, rotation, epsilon=epsilon, implementation=implementation)
    if scale.ndim > 1 and mesh.shape["tensor"] > 1:
        return norm.rms_norm_backward(x, dy, scale, rotation, epsilon=epsilon, implementation="xla")
    heads = ("heads",) if per_head else ()
    rows = partition_spec("batch", "tokens", *heads, *(None,) * scale.ndim)
    tables = None if rotation is None else (partition_spec("batch", "tokens", None),) * 2
    whole = partition_spec(*(None,) * scale.ndim)

    def local(*operands: Array) -> tuple[Array, Array]:
        dx, dscale = norm.rms_norm_backward(*operands, epsilon=epsilon, implementation=implementation)
        return dx, jax.lax.psum(dscale.reshape(-1), (*_TOKEN_AXES, *(RULES["heads"] if per_head else ())))

    out_specs = rows, partition_spec(None)
    mapped = jax.shard_map(local, in_specs=(rows, rows, whole, tables), out_specs=out_specs, check_vma=False)
    dx, dscale = mapped(x, dy, scale.astype(jnp.float32), rotation)  # the sum over devices is float32 too
    return dx, dscale.reshape(scale.shape).astype(scale.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, *, epsilon: float, implementation: str | None = None) -> Array:
    """`pallas_kernels.layer_norm.layer_norm` of x [B, T, D], on the current mesh or without one."""
    run = functools.partial(layer_norms.layer_norm, epsilon=epsilon, implementation=implementation)
    if current_mesh() is None:
        return run(x, scale, bias)
    rows, whole = partition_spec("batch", "tokens", None), partition_spec(None)
    return jax.shard_map(run, in_specs=(rows, whole, whole), out_specs=rows, check_vma=False)(x, scale, bias)


def layer_norm_backward(
    x: Array, dy: Array, scale: Array, *, epsilon: float, implementation: str | None = None
) -> tuple[Array, Array, Array]:
    """`pallas_kernels.layer_norm.layer_norm_backward` of x [B, T, D], on the current mesh or without one."""
    run = functools.partial(layer_norms.layer_norm_backward, epsilon=epsilon, implementation=implementation)
    if current_mesh() is None:
        return run(x, dy, scale)
    rows, whole = partition_spec("batch", "tokens", None), partition_spec(None)

    def local(*operands: Array) -> tuple[Array, ...]:
        dx, *sums = run(*operands)
        return dx, *(jax.lax.psum(total, _TOKEN_AXES) for total in sums)

    specs = (rows, rows, whole), (rows, whole, whole)
    return jax.shard_map(local, in_specs=specs[0], out_specs=specs[1], check_vma=False)(x, dy, scale)


def biased_gelu_backward(x: Array, bias: Array, dy: Array, *, implementation: str | None = None) -> tuple[Array, Array]:
    """`pallas_kernels.biased_gelu.biased_gelu_backward` of an FFN's x [B, T, F], on the current mesh or without one."""
    run = functools.partial(biased_gelu.biased_gelu_backward, implementation=implementation)
    if current_mesh() is None:
        return run(x, bias, dy)
    rows, columns = partition_spec("batch", "tokens", "ffn"), partition_spec("ffn")

    def local(*operands: Array) -> tuple[Array, Array]:
        dx, dbias = run(*operands)
        return dx, jax.lax.psum(dbias, _TOKEN_AXES)

    specs = (rows, columns, rows), (rows, columns)
    return jax.shard_map(local, in_specs=specs[0], out_specs=specs[1], check_vma=False)(x, bias, dy)
