"""Triton kernels, called through jax-triton: the implementation "triton" of the internal block.

For NVIDIA GPUs from Ampere on (compute capability 8.0). Two parts under one softmax, tuned apart: the sequence part is
compute-bound (`sequence_forward`, `sequence_dq`, `sequence_dkv`), the depth part memory-bound (`depth_forward`,
`depth_backward`).
    forward   depth first; the sequence kernel merges the depth part's (out, lse) in its epilogue.
    backward  both parts on the merged lse and delta; the depth kernel adds its dquery to the sequence part's.
On a CPU the same kernels run under Triton's interpreter where the environment has TRITON_INTERPRET=1: for tests.
"""

from __future__ import annotations

from pallas_kernels.triton import versions

versions.check()

from typing import Any  # noqa: E402  what follows imports triton

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from pallas_kernels.mosaic_gpu import masks  # noqa: E402
from pallas_kernels.mosaic_gpu.warpgroup import in_default_modes  # noqa: E402
from pallas_kernels.triton import batches, call, depth, sequence  # noqa: E402

__all__ = ["attention_backward", "attention_forward", "check_supported", "depth_backward", "depth_forward"]

OLDEST_CAPABILITY = (8, 0)
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = range(16, 257, 2)
MAX_SLOTS = 512


def check_supported(*, dtype: Any, head_dim: int, slots: int = 0, **facts: object) -> None:
    """Raises NotImplementedError, with the reason, if the kernels do not take such a call.

    Args:
        dtype, head_dim, slots: of the call.
        **facts: further facts of `dispatch.resolve`; every mask and any number of heads is supported.
    """
    del facts
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        raise NotImplementedError(f"triton: dtype={name}: the tensor cores' kernels take {' or '.join(DTYPES)}")
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(
            f"triton: head_dim={head_dim}: expected an even number from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"
        )
    if slots > MAX_SLOTS:
        raise NotImplementedError(f"triton: {slots} depth slots: expected at most {MAX_SLOTS}")
    backend = jax.default_backend()
    if backend != "gpu" and not call.interpreting():
        raise NotImplementedError(
            f"triton: needs an NVIDIA GPU, and JAX runs on {backend} here; TRITON_INTERPRET=1 interprets the kernels"
        )
    if call.capability() < OLDEST_CAPABILITY:
        raise NotImplementedError(
            f"triton: compute capability {'.'.join(map(str, call.capability()))}: expected at least "
            f"{'.'.join(map(str, OLDEST_CAPABILITY))} (Ampere)"
        )


@in_default_modes
def attention_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    depth_key: jax.Array | None = None,
    depth_value: jax.Array | None = None,
    depth_length: int | jax.Array | None = None,
    *,
    scale: float,
    causal: bool,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    key_length: jax.Array | None = None,
    with_rest: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(out [B, T, N, H], lse [B, T, N] float32, rest or None): see `pallas_kernels.block.attention_forward`."""

    def run(arrays: dict[str, Any], depth_length: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        query, key, value = arrays["query"], arrays["key"], arrays["value"]
        other = (None, None, None)
        if _has_depth(depth_key, depth_length):
            other = depth.forward(
                query, arrays["depth_key"], arrays["depth_value"], depth_length, scale=scale, with_rest=with_rest
            )
        prepared = masks.prepare(query.shape[0], query.shape[1], key.shape[1], causal, *arrays["masks"])
        return sequence.forward(query, key, value, *other, scale=scale, masks=prepared, with_rest=with_rest)

    arrays = {"query": query, "key": key, "value": value, "depth_key": depth_key, "depth_value": depth_value}
    arrays["masks"] = query_positions, key_positions, query_segment_ids, key_segment_ids, key_length
    return batches.folding(run)(arrays, depth_length)


@in_default_modes
def attention_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    depth_key: jax.Array | None,
    depth_value: jax.Array | None,
    depth_length: int | jax.Array | None,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    scale: float,
    causal: bool,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    key_length: jax.Array | None = None,
    depth_key_gradient: jax.Array | None = None,
    depth_value_gradient: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """(dquery, dkey, dvalue, ddepth_key, ddepth_value): see `pallas_kernels.block.attention_backward`."""

    def run(arrays: dict[str, Any], depth_length: Any) -> tuple[jax.Array | None, ...]:
        query, key, value, dout = (arrays[name] for name in ("query", "key", "value", "dout"))
        prepared = masks.prepare(query.shape[0], query.shape[1], key.shape[1], causal, *arrays["masks"])
        statistics = arrays["lse"], arrays["delta"]
        dquery, dkey, dvalue = sequence.backward(
            query, key, value, dout, *statistics, scale=scale, masks=prepared
        )
        if depth_key is None:
            return dquery, dkey, dvalue, None, None
        slots = arrays["depth_key"], arrays["depth_value"]
        if not _has_depth(depth_key, depth_length):
            return dquery, dkey, dvalue, *_untouched(slots, arrays["buffers"])
        dquery, *gradients = depth.backward(
            query, *slots, depth_length, dout, *statistics, scale=scale, dquery=dquery,
            depth_key_gradient=arrays["buffers"][0], depth_value_gradient=arrays["buffers"][1],
        )  # fmt: skip
        return dquery, dkey, dvalue, *gradients

    arrays = {
        "query": query, "key": key, "value": value, "depth_key": depth_key, "depth_value": depth_value, "dout": dout,
        "lse": lse, "delta": delta, "buffers": (depth_key_gradient, depth_value_gradient),
        "masks": (query_positions, key_positions, query_segment_ids, key_segment_ids, key_length),
    }  # fmt: skip
    return batches.folding(run)(arrays, depth_length)


@in_default_modes
def depth_forward(
    query: jax.Array,
    depth_key: jax.Array,
    depth_value: jax.Array,
    depth_length: int | jax.Array | None = None,
    *,
    scale: float,
    with_rest: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(out, lse, rest or None) of the depth part alone: see `pallas_kernels.block.depth_forward`."""
    if not _has_depth(depth_key, depth_length):
        nothing = jnp.zeros_like(query)
        return nothing, jnp.full(query.shape[:3], -jnp.inf, jnp.float32), nothing if with_rest else None

    def run(arrays: tuple[jax.Array, ...], depth_length: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        return depth.forward(*arrays, depth_length, scale=scale, with_rest=with_rest)

    return batches.folding(run)((query, depth_key, depth_value), depth_length)


@in_default_modes
def depth_backward(
    query: jax.Array,
    depth_key: jax.Array,
    depth_value: jax.Array,
    depth_length: int | jax.Array | None,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    scale: float,
    depth_key_gradient: jax.Array | None = None,
    depth_value_gradient: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dquery, ddepth_key, ddepth_value) of the depth part: see `pallas_kernels.block.depth_backward`."""
    buffers = depth_key_gradient, depth_value_gradient
    if not _has_depth(depth_key, depth_length):
        return jnp.zeros_like(query), *_untouched((depth_key, depth_value), buffers)

    def run(arrays: tuple[Any, ...], depth_length: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        *arrays, (key_gradient, value_gradient) = arrays
        query, depth_key, depth_value, *output_gradients = arrays
        return depth.backward(
            query, depth_key, depth_value, depth_length, *output_gradients, scale=scale,
            depth_key_gradient=key_gradient, depth_value_gradient=value_gradient,
        )  # fmt: skip

    return batches.folding(run)((query, depth_key, depth_value, dout, lse, delta, buffers), depth_length)


def _has_depth(depth_key: jax.Array | None, depth_length: int | jax.Array | None) -> bool:
    """False where it is known before running that no slot is filled."""
    if depth_key is None or depth_key.shape[2] == 0:
        return False
    return not (isinstance(depth_length, int) and depth_length == 0)


def _untouched(slots: tuple[jax.Array, jax.Array], buffers: tuple[jax.Array | None, ...]) -> tuple[jax.Array, ...]:
    """The depth gradients where no slot is filled."""
    return tuple(jnp.zeros_like(x) if b is None else b for x, b in zip(slots, buffers, strict=True))
