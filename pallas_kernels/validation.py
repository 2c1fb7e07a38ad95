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

DTYPES = ("float32", "bfloat16", "float16")
LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)  # of float32's normal numbers


def check_attention(
    query: Any,
    key: Any,
    value: Any,
    depth_key: Any,
    depth_value: Any,
    segment_ids: Any,
    query_positions: Any,
    key_length: Any,
    causal: Any,
    return_lse: Any,
) -> None:
    """Raises ValueError unless the arrays fit together as `moda_attention` documents."""
    batch, tokens, heads, head_dim = _check_query(query)
    keys = _check_key(key, (batch, tokens, None, head_dim), query, query_positions is not None)
    _check_heads("key", key.shape[2], heads)
    _check_array("value", value, key.shape, "[B, T, K, H]", query)
    for name, other in (("depth_key", depth_value), ("depth_value", depth_key)):
        if (depth_key if name == "depth_key" else depth_value) is None and other is not None:
            raise ValueError(f"{name}=None: expected an array, since its counterpart was given")
    if depth_key is not None:
        _check_depth_arrays(depth_key, depth_value, (batch, tokens, None, key.shape[2], head_dim), query)
    for name, array, shape, axes in (
        ("segment_ids", segment_ids, (batch, keys), "[B, T]"),
        ("query_positions", query_positions, (batch, tokens), "[B, Tq]"),
        ("key_length", key_length, (batch,), "[B]"),
    ):
        if array is not None:
            _check_array(name, array, shape, axes, query, dtype=jnp.dtype("int32"))
    _check_bool("causal", causal)
    _check_bool("return_lse", return_lse)


def check_depth(query: Any, depth_key: Any, depth_value: Any, return_lse: Any) -> None:
    """Raises ValueError unless the arrays fit together as `depth_attention` documents."""
    batch, tokens, heads, head_dim = _check_query(query)
    _check_depth_arrays(depth_key, depth_value, (batch, tokens, None, None, head_dim), query)
    _check_heads("depth_key", depth_key.shape[3], heads)
    _check_bool("return_lse", return_lse)


def checked_depth_length(depth_length: Any, slots: int) -> int | Array | None:
    """None, an int within 0..slots, or an int32 scalar array clipped to that range."""
    if depth_length is None:
        return None
    expected = f"None, an int within 0..{slots} (S) or an int32 scalar array"
    if isinstance(depth_length, bool | np.bool_):
        raise ValueError(f"depth_length={depth_length!r}: expected {expected}")
    if isinstance(depth_length, int | np.integer):
        if not 0 <= depth_length <= slots:
            raise ValueError(f"depth_length={depth_length}: expected {expected}")
        return operator.index(depth_length)
    if not _is_array(depth_length):
        raise ValueError(f"depth_length={depth_length!r}: expected {expected}")
    if depth_length.shape != () or depth_length.dtype != jnp.int32:
        raise ValueError(f"depth_length is {_describe(depth_length)}: expected {expected}")
    return jnp.clip(jnp.asarray(depth_length), 0, slots)


def checked_key_length(key_length: Array | None, keys: int) -> Array | None:
    """None, or the int32 lengths [B] clipped to 0..keys."""
    return None if key_length is None else jnp.clip(jnp.asarray(key_length), 0, keys)


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


def _check_depth_arrays(depth_key: Any, depth_value: Any, shape: tuple[int | None, ...], query: Any) -> None:
    _check_array("depth_key", depth_key, shape, "[B, T, S, K, H]", query, empty_axis=2)
    _check_array("depth_value", depth_value, depth_key.shape, "[B, T, S, K, H]", query, empty_axis=2)


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


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={value!r}: expected a bool that is known while tracing")


def _is_array(value: Any) -> bool:
    return isinstance(value, Array | np.ndarray)


def _describe(array: Any) -> str:
    return f"{array.dtype}[{','.join(str(size) for size in array.shape)}]"
