"""Sums over a token's slots of hidden states on the mesh: every device makes those of its own tokens, by
`pallas_kernels.mixture` and `pallas_kernels.weighted_sums` under `shard_map`. The stream never moves."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.parallel.mesh import RULES, current_mesh, partition_spec
from pallas_kernels import mixture
from pallas_kernels import weighted_sums as sums

Array = jax.Array

_STREAM, _OUT, _LSE = ("batch", "tokens", "slots", "channels"), ("batch", "tokens", "channels"), ("batch", "tokens")
_ROWS = ("batch", "tokens", None, None)  # of every token: weights or sums
_TOKEN_AXES = (*RULES["batch"], *RULES["tokens"])  # the mesh axes that tokens are split over


def softmax_mixture(
    hidden: Array, direction: Array, length: Array | np.int32, *, epsilon: float, implementation: str | None = None
) -> tuple[Array, Array]:
    """`pallas_kernels.mixture.softmax_mixture` on the current mesh or without one."""
    run = functools.partial(mixture.softmax_mixture, epsilon=epsilon, implementation=implementation)
    if current_mesh() is None:
        return run(hidden, direction, length)
    mapped = jax.shard_map(
        run, in_specs=(partition_spec(*_STREAM), partition_spec(None), partition_spec()),
        out_specs=(partition_spec(*_OUT), partition_spec(*_LSE)), check_vma=False,
    )  # fmt: skip
    return mapped(hidden, direction, jnp.asarray(length, jnp.int32))


def softmax_mixture_backward(
    hidden: Array,
    direction: Array,
    length: Array | np.int32,
    result: tuple[Array, Array],
    dresult: tuple[Array, Array],
    dhidden: Array,
    *,
    epsilon: float,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """`pallas_kernels.mixture.softmax_mixture_backward` on the current mesh or without one."""
    run = functools.partial(mixture.softmax_mixture_backward, epsilon=epsilon, implementation=implementation)
    if current_mesh() is None:
        return run(hidden, direction, length, result, dresult, dhidden)

    def local(*operands: Array) -> tuple[Array, Array]:
        ddirection, total = run(*operands)
        return jax.lax.psum(ddirection, _TOKEN_AXES), total

    part = partition_spec(*_OUT), partition_spec(*_LSE)
    stream = partition_spec(*_STREAM)
    mapped = jax.shard_map(
        local, in_specs=(stream, partition_spec(None), partition_spec(), part, part, stream),
        out_specs=(partition_spec(None), stream), check_vma=False,
    )  # fmt: skip
    return mapped(hidden, direction, jnp.asarray(length, jnp.int32), result, dresult, dhidden)


def weighted_sums(
    hidden: Array, weights: Array, length: Array | np.int32, *, implementation: str | None = None
) -> Array:
    """`pallas_kernels.weighted_sums.weighted_sums` on the current mesh or without one."""
    run = functools.partial(sums.weighted_sums, implementation=implementation)
    if current_mesh() is None:
        return run(hidden, weights, length)
    rows = partition_spec(*_ROWS)
    mapped = jax.shard_map(
        run, in_specs=(partition_spec(*_STREAM), rows, partition_spec()), out_specs=rows, check_vma=False
    )
    return mapped(hidden, weights, jnp.asarray(length, jnp.int32))


def weighted_sums_backward(
    hidden: Array,
    weights: Array,
    length: Array | np.int32,
    dout: Array,
    dhidden: Array,
    *,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """`pallas_kernels.weighted_sums.weighted_sums_backward` on the current mesh or without one."""
    run = functools.partial(sums.weighted_sums_backward, implementation=implementation)
    if current_mesh() is None:
        return run(hidden, weights, length, dout, dhidden)
    stream, rows = partition_spec(*_STREAM), partition_spec(*_ROWS)
    mapped = jax.shard_map(
        run, in_specs=(stream, rows, partition_spec(), rows, stream), out_specs=(rows, stream), check_vma=False
    )
    return mapped(hidden, weights, jnp.asarray(length, jnp.int32), dout, dhidden)
