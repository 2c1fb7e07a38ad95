"""The internal block's kernels on a mesh of the caller's: what of a call can be split, and what a device computes.

    batch, KV heads   with their query heads: nothing is exchanged.
    query tokens      the slots of a token go with it. Keys and values of the sequence are needed whole by every device,
                      and their gradients are summed over the devices.
Everything else a device needs whole.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.operands import Call, Gradients, Upstream
from pallas_kernels.partition import Axes, Rule, laid_out_like, partitioned
from pallas_kernels.parts import Part

_HEADS = "kv_heads group"
_QUERY = ("batch", "tokens", _HEADS, "head_dim")
_KEY = ("batch", "keys", "kv_heads", "head_dim")
_DEPTH = ("batch", "tokens", "slots", "kv_heads", "head_dim")
_STATISTICS = ("batch", "tokens", _HEADS)

# Dimensions of the arrays by their places in `Call`, `Upstream`, `Part` and `Gradients`.
_DIMENSIONS = {
    **dict.fromkeys(("query", "dout", "out", "rest"), _QUERY),
    **dict.fromkeys(("key", "value"), _KEY),
    **dict.fromkeys(("depth.key", "depth.value", "depth_key", "depth_value"), _DEPTH),
    **dict.fromkeys(("depth.start", "depth.length", "depth.deferred"), ()),
    **dict.fromkeys(("mask.query_positions", "mask.query_segment_ids"), ("batch", "tokens")),
    **dict.fromkeys(("mask.key_positions", "mask.key_segment_ids"), ("batch", "keys")),
    "mask.key_length": ("batch",),
    **dict.fromkeys(("lse", "delta"), _STATISTICS),
}
_WHOLE = frozenset({"group", "keys", "slots", "head_dim"})


def forward(implementation: ModuleType, call: Call, *, with_rest: bool) -> Part:
    """`pallas_kernels.block.forward` by an implementation's kernels."""
    operands = _Operands(call)
    has_rest = with_rest and call.query.dtype != jnp.float32

    def local(axes: Axes, *arrays: Array) -> list[Array]:
        part = implementation.forward(_on_device(axes, operands.rebuilt(arrays)[0]), with_rest=with_rest)
        return list(part if has_rest else part[:2])

    names = Part._fields if has_rest else Part._fields[:2]
    return Part(*partitioned(local, operands.rule(names), operands.arrays, references=True))


def backward(
    implementation: ModuleType, call: Call, upstream: Upstream, buffers: tuple[Array, Array] | None
) -> Gradients:
    """`pallas_kernels.block.backward` by an implementation's kernels."""
    sums = None if buffers is None else Gradients(None, depth_key=buffers[0], depth_value=buffers[1])
    operands = _Operands(call, upstream, sums)
    names = ["query"] if call.query_gradient else []
    names += [] if call.key is None else ["key", "value"]
    names += [] if call.depth is None else ["depth_key", "depth_value"]

    def local(axes: Axes, *arrays: Array) -> list[Array]:
        call, upstream, sums = operands.rebuilt(arrays)
        buffers = None if sums is None else (sums.depth_key, sums.depth_value)
        gradients = implementation.backward(_on_device(axes, call), upstream, buffers)
        if "tokens" in axes and call.key is not None:
            whole = (_summed(x, axes["tokens"]) for x in (gradients.key, gradients.value))
            gradients = gradients._replace(**dict(zip(("key", "value"), whole, strict=True)))
        return [getattr(gradients, name) for name in names]

    results = partitioned(local, operands.rule(names), operands.arrays, references=True)
    slots = (None, None) if call.depth is None else (call.depth.key, call.depth.value)
    arrays = Gradients(call.query, call.key, call.value, *(slots if buffers is None else buffers))
    pairs = zip(names, results, strict=True)
    return Gradients(**{"query": None} | {name: laid_out_like(result, getattr(arrays, name)) for name, result in pairs})


class _Operands:
    """The arrays of a call and of other values of the op. Numbers that are known while tracing stay as they are.

    Attributes:
        arrays: those arrays, in order.
    """

    def __init__(self, call: Call, *others: Any) -> None:
        trees = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (call, *others)]
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for tree in trees for path, _ in tree]
        self._leaves, self._tree = jax.tree.flatten((call, *others))
        self._is_array = [not isinstance(leaf, int | np.integer) for leaf in self._leaves]
        self._names = list(itertools.compress(names, self._is_array))
        self._group = call.query.shape[2] // call.num_kv_heads
        self.arrays = list(itertools.compress(self._leaves, self._is_array))

    def rebuilt(self, arrays: Sequence[Array]) -> tuple[Any, ...]:
        """The values with other arrays."""
        others = iter(arrays)
        pairs = zip(self._leaves, self._is_array, strict=True)
        leaves = [next(others) if is_array else leaf for leaf, is_array in pairs]
        return jax.tree.unflatten(self._tree, leaves)

    def rule(self, results: Sequence[str]) -> Rule:
        """The rule of a function from these arrays to results of those names."""
        operands, results = ([_DIMENSIONS[name] for name in names] for names in (self._names, results))
        return Rule(tuple(operands), tuple(results), _WHOLE, (("group", self._group),))


def _on_device(axes: Axes, call: Call) -> Call:
    """A device's part of a call as a call: its queries are at their own positions in the sequence."""
    mask = call.mask
    if "tokens" not in axes or call.key is None or not mask.causal or mask.query_positions is not None:
        return call
    batch, tokens = call.query.shape[:2]
    places = jax.lax.axis_index(axes["tokens"]) * tokens + jnp.arange(tokens, dtype=jnp.int32)
    mask = dataclasses.replace(mask, query_positions=jnp.broadcast_to(places, (batch, tokens)))
    return dataclasses.replace(call, mask=mask)


def _summed(x: Array, axes: tuple[str, ...]) -> Array:
    """The sum over devices, in float32."""
    return jax.lax.psum(x.astype(jnp.float32), axes).astype(x.dtype)
