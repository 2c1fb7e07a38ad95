"""The mixture of a token's slots on the mesh: every device mixes its own tokens' (`pallas_kernels.mixture`), under
`shard_map`. The stream never moves."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.parallel.mesh import RULES, current_mesh, partition_spec
from pallas_kernels import mixture

Array = jax.Array

_STREAM, _OUT, _LSE = ("batch", "tokens", "slots", "channels"), ("batch", "tokens", "channels"), ("batch", "tokens")
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
