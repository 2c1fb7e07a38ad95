"""Checks of what a user passes to the public op. Every message says the argument, what came and what was expected."""

from __future__ import annotations

import contextlib
import math
import numbers
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.operands import Call, DepthKV, Mask

DTYPES = ("float32", "bfloat16", "float16")
LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)  # of float32's normal numbers


def checked_attention(call: Call) -> Call:
    """What `moda_attention` was given, as the implementations take it.

    Raises:
        ValueError: it is not as `moda_attention` documents.
    """
    query, key, value, mask = call.query, call.key, call.value, call.mask
    batch, tokens, heads, head_dim = _check_query(query)
    keys = _check_key(key, (batch, tokens, None, head_dim), query, mask.query_positions is not None)
    _check_heads("key", key.shape[2], heads)
    _check_array("value", value, key.shape, "[B, T, K, H]", query)
    if call.depth is not None and not (call.depth.key is None and call.depth.value is None):
        _check_depth_arrays(call.depth, (batch, tokens, None, key.shape[2], head_dim), query)
    for name, array, shape, axes in (
        ("segment_ids", mask.key_segment_ids, (batch, keys), "[B, T]"),
        ("query_positions", mask.query_positions, (batch, tokens), "[B, Tq]"),
        ("key_length", mask.key_length, (batch,), "[B]"),
    ):
        if array is not None:
            _check_array(name, array, shape, axes, query, dtype=jnp.dtype("int32"))
    check_bool("causal", mask.causal)
    depth = None if call.depth is None else _checked_window(call.depth)
    depth = None if depth is None or depth.empty else _traceable(depth)  # None: what is not read has gradient 0
    if depth is not None and depth.chunk > 1 and mask.query_positions is not None:
        raise ValueError(
            f"depth_chunk={depth.chunk}: expected 1 with query_positions, as depth_key has the queries' tokens alone"
        )
    return Call(query, key, value, _checked_mask(mask, keys), depth, checked_scale(call.scale, head_dim))


def checked_depth(call: Call) -> Call:
    """What `depth_attention` was given, as the implementations take it.

    Raises:
        ValueError: it is not as `depth_attention` documents.
    """
    batch, tokens, heads, head_dim = _check_query(call.query)
    _check_depth_arrays(call.depth, (batch, tokens, None, None, head_dim), call.query)
    _check_heads("depth_key", call.depth.key.shape[3], heads)
    return Call(call.query, depth=_traceable(_checked_window(call.depth)), scale=checked_scale(call.scale, head_dim))


def _checked_window(depth: DepthKV) -> DepthKV | None:
    """The depth part with its window within 0..S; None without depth arrays."""
    slots = 0 if depth.key is None else depth.slots
    length = checked_slots("depth_length", depth.length, slots)
    start = checked_slots("depth_start", depth.start, slots)
    return None if depth.key is None else DepthKV(depth.key, depth.value, start, length, chunk=depth.chunk)


def _traceable(depth: DepthKV) -> DepthKV:
    """The depth part with the ends of its window as int32 arrays, so that calls differ in their values alone."""
    ends = (None if end is None else jnp.asarray(end, jnp.int32) for end in (depth.start, depth.length))
    return DepthKV(depth.key, depth.value, *ends, chunk=depth.chunk)


def _checked_mask(mask: Mask, keys: int) -> Mask:
    """With the queries' segment ids, which are those of the keys at their positions, and the key length in 0..keys."""
    length = None if mask.key_length is None else jnp.clip(jnp.asarray(mask.key_length), 0, keys)
    ids = query_ids = mask.key_segment_ids
    if ids is not None and mask.query_positions is not None:
        places = jnp.clip(jnp.asarray(mask.query_positions), 0, keys - 1)
        query_ids = jnp.take_along_axis(jnp.asarray(ids), places, axis=1)
    return Mask(bool(mask.causal), mask.query_positions, None, query_ids, ids, length)


def checked_slots(name: str, count: Any, slots: int) -> int | Array | None:
    """None, an int within 0..slots, or an int32 scalar array clipped to that range."""
    if count is None:
        return None
    expected = f"None, an int within 0..{slots} (S) or an int32 scalar array"
    if isinstance(count, bool | np.bool_):
        raise ValueError(f"{name}={count!r}: expected {expected}")
    if isinstance(count, int | np.integer):
        if not 0 <= count <= slots:
            raise ValueError(f"{name}={count}: expected {expected}")
        return operator.index(count)
    if not _is_array(count):
        raise ValueError(f"{name}={count!r}: expected {expected}")
    if count.shape != () or count.dtype != jnp.int32:
        raise ValueError(f"{name} is {_describe(count)}: expected {expected}")
    return jnp.clip(jnp.asarray(count), 0, slots)


def checked_chunk(chunk: Any) -> int:
    """The chunk as an int of at least 1."""
    is_int = isinstance(chunk, int | np.integer) and not isinstance(chunk, bool | np.bool_)
    if not is_int or chunk < 1:
        raise ValueError(f"depth_chunk={chunk!r}: expected an int of at least 1 that is known while tracing")
    return operator.index(chunk)


def checked_scale(scale: Any, head_dim: int) -> float:
    """The scale as a float, H ** -0.5 for None. What float32 flushes to zero is zero."""
    if scale is None:
        return head_dim**-0.5
    value = math.nan
    if isinstance(scale, numbers.Real) and not isinstance(scale, bool):
        with contextlib.suppress(OverflowError):  # an int beyond the floats
            value = float(scale)
    if not abs(value) <= LARGEST:  # a NaN is refused too
        raise ValueError(
            f"scale={scale!r}: expected None or a number that is finite in float32 and known while tracing"
        )
    return value if abs(value) >= SMALLEST else 0.0


def _check_query(query: Any) -> tuple[int, int, int, int]:
    _check_array("query", query, (None, None, None, None), "[B, T, N, H]", query)
    if jnp.dtype(query.dtype).name not in DTYPES:
        raise ValueError(f"query has dtype {query.dtype}: expected one of {DTYPES}")
    return query.shape


def _check_key(key: Any, shape: tuple[int | None, ...], query: Any, has_positions: bool) -> int:
    """The number of keys: that of the queries, or with query positions at least as many."""
    batch, tokens, *rest = shape
    if not has_positions and _is_array(key) and len(key.shape) == 4 and key.shape[1] > tokens:
        raise ValueError(
            f"key has shape {key.shape}: expected query's {tokens} tokens, or query_positions [B, Tq] beside a query "
            f"of shape {query.shape}, shorter than its cache of keys"
        )
    _check_array("key", key, (batch, None if has_positions else tokens, *rest), "[B, T, K, H]", query)
    if key.shape[1] < tokens:
        raise ValueError(f"key has shape {key.shape}: expected at least the {tokens} tokens of query {query.shape}")
    return key.shape[1]


def _check_depth_arrays(depth: DepthKV, shape: tuple[int | None, ...], query: Any) -> None:
    for name, array, other in (("depth_key", depth.key, depth.value), ("depth_value", depth.value, depth.key)):
        if array is None and other is not None:
            raise ValueError(f"{name}=None: expected an array, since its counterpart was given")
    _check_array("depth_key", depth.key, shape, "[B, T, S, K, H]", query, empty_axis=2)
    _check_array("depth_value", depth.value, depth.key.shape, "[B, T, S, K, H]", query, empty_axis=2)


def _check_heads(name: str, kv_heads: int, heads: int) -> None:
    if heads % kv_heads != 0:
        raise ValueError(f"{name} has {kv_heads} heads: expected a divisor of query's {heads}")


def _check_array(
    name: str,
    array: Any,
    shape: tuple[int | None, ...],
    axes: str,
    query: Any,
    *,
    dtype: Any = None,
    empty_axis: int | None = None,
) -> None:
    """An array of that shape (None: any size of at least 1; `empty_axis` may be 0) and dtype (None: the query's)."""
    if not _is_array(array):
        raise ValueError(f"{name} is {type(array).__name__}: expected an array of shape {axes}")
    fits = len(array.shape) == len(shape) and all(
        size in (None, came) for size, came in zip(shape, array.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        beside = "" if array is query else f" beside a query of shape {query.shape}"
        raise ValueError(f"{name} has shape {array.shape}: expected {axes} = [{wanted}]{beside}")
    if any(size == 0 for axis, size in enumerate(array.shape) if axis != empty_axis):
        raise ValueError(f"{name} has shape {array.shape}: expected {axes} without an empty axis")
    expected = query.dtype if dtype is None else dtype
    if array.dtype != expected:
        source = "the query's " if dtype is None else ""
        raise ValueError(f"{name} has dtype {array.dtype}: expected {source}{expected}")


def check_bool(name: str, value: Any) -> None:
    """Raises ValueError unless it is a Python or NumPy bool."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={value!r}: expected a bool that is known while tracing")


def _is_array(value: Any) -> bool:
    return isinstance(value, Array | np.ndarray)


def _describe(array: Any) -> str:
    return f"{array.dtype}[{','.join(str(size) for size in array.shape)}]"
