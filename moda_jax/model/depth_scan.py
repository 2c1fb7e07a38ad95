"""The layer loop: runs stacked layers over one depth stream with O(S) memory, forward and backward.

Plain autodiff through a loop whose carry is the depth buffer keeps one copy of the buffer per layer, O(S^2) in all.
Slots are written once and never change, so the *final* buffer holds what every layer read: layer l's view is the final
buffer with its own `length`. The reverse loop therefore keeps that one buffer and carries one gradient buffer, which

1. hands layer l the gradient of the entries that it wrote (its slots, complete once all later layers are reversed),
2. receives in place what layer l's read contributes to the slots of earlier layers.

Per layer only what `remat` names is stored, never the buffer.

Two kinds of block:

- any function `block(params, x, stream, *shared) -> (x, stream)`: its backward recomputes the whole block from its
  input;
- a `PartedBlock`, cut before and after the attention op, so that attention's output and log-sum-exp can be kept and its
  forward is not run again, and the op's backward adds into the gradient buffer directly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.model.depth_stream import DepthStream, Entry, is_traced, read_slot, write_slot
from moda_jax.parallel.attention import Options, attention_backward, attention_forward

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Stored:
    """What the forward loop keeps per layer, besides the layer's input: the meaning of a `remat` name."""

    attention: bool  # the op's output [B, T, N, H] and lse [B, T, N]
    parts: bool  # everything that autodiff of the parts before and after the op needs


REMAT = {
    "full": Stored(attention=False, parts=False),
    "attention": Stored(attention=True, parts=False),
    "ffn": Stored(attention=True, parts=True),  # the FFN itself then keeps less: see `moda_jax.model.layers.swiglu`
    "none": Stored(attention=True, parts=True),
}


@dataclasses.dataclass(frozen=True)
class PartedBlock:
    """A layer cut at its attention op, for `depth_scan`.

    Attributes:
        before: (params, x, *shared) -> (query [B, T, N, H], key, value [B, T, K, H]).
        after: (params, x, key, value, attended [B, T, N, H], *shared) -> (x, entries); entries is a tuple of
            `entries_per_layer` pairs (key, value), [B, T, K, H] each.
        entries_per_layer: slots that the layer fills.
        writes_own_key_value: entries[0] is `before`'s (key, value): they are then re-read from the stream, not stored.
        segment_ids: (*shared) -> [B, T] int32 or None: the op's mask.
        scale: of the logits; None: H ** -0.5.
        implementation: of the op; None: the best for the device.
        prepare: one layer's parameters -> what both parts get, differentiable; on a mesh, the gather of that layer.
    """

    before: Callable[..., tuple[Array, Array, Array]]
    after: Callable[..., tuple[PyTree, tuple[Entry, ...]]]
    entries_per_layer: int
    writes_own_key_value: bool = False
    segment_ids: Callable[..., Array | None] = lambda *shared: None
    scale: float | None = None
    implementation: str | None = None
    prepare: Callable[[PyTree], PyTree] = lambda params: params


def depth_scan(
    block: Callable[..., tuple[PyTree, DepthStream]] | PartedBlock,
    params: PyTree,
    x: PyTree,
    stream: DepthStream,
    *shared: PyTree,
    remat: str = "attention",
    unroll: bool = False,
    gradient_dtype: jnp.dtype | str | None = None,
) -> tuple[PyTree, DepthStream]:
    """Runs a stack of layers, each reading and appending to the depth stream, with memory linear in the slots.

    Args:
        block: `block(params_of_one_layer, x, stream, *shared) -> (x, stream)`, which changes the stream by `append`
            only, or a `PartedBlock`. Everything that is differentiated must come in through the arguments.
        params: arrays stacked over layers: leading axis L on every leaf.
        x: the first layer's input, an array or pytree; every layer returns the same shapes and dtypes.
        stream: what came before; enough free slots for all layers.
        *shared: given to every layer unchanged (positions, segment ids, ...); gradients of the layers are summed.
        remat: for a `PartedBlock`, what is stored per layer for the backward pass: "full": the layer's input alone, all
            else is recomputed; "attention": also attention's output and lse, so that attention's forward is not run
            again; "none": all that autodiff of the parts needs; "ffn": the same here, `Transformer`'s blocks then
            compute the FFN's hidden activations again. Other blocks are always recomputed from their input.
        unroll: compile every layer by itself instead of one loop body: on a GPU faster to run (nothing is copied into
            stacks over layers and out of them), slower to compile; the memory is the same.
        gradient_dtype: dtype in which the stream's gradient accumulates over the layers; None: the stream's.

    Returns:
        The last layer's output and the stream with all entries.

    Raises:
        ValueError: an unknown `remat`, params without a common leading axis, or not enough free slots (when the
            stream's length is concrete; a traced overflow leaves the stream as it is).
    """
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r}: expected one of {tuple(REMAT)}")
    leading = {leaf.shape[:1] for leaf in jax.tree.leaves(params)}
    if len(leading) != 1 or leading == {()}:
        raise ValueError(
            f"depth_scan: params must share one leading axis of layers, got leading sizes {sorted(leading)}"
        )
    ((num_layers,),) = leading
    if isinstance(block, PartedBlock):
        reread = block.writes_own_key_value and not is_traced(stream.length)
        layer: _Layer = _PartedLayer(block, REMAT[remat], reread)
    else:
        # Layers are compared by value, to compile once; a callable that has no hash is its own value.
        layer = _WholeLayer(block if isinstance(block, Hashable) else lambda *arguments: block(*arguments))
    dtype = stream.key.dtype if gradient_dtype is None else jnp.dtype(gradient_dtype)
    length = None
    if not is_traced(stream.length):  # inside the loop it is traced; out here it stays concrete
        entries = num_layers * layer.entries(params, x, stream, shared)
        _check_capacity(stream, entries)
        length = stream.length_after(entries)
    x, key, value, traced_length = _loop(
        layer, unroll, dtype, params, x, stream.key, stream.value, jnp.int32(stream.length), shared
    )
    return x, DepthStream(key, value, traced_length if length is None else length)


def _check_capacity(stream: DepthStream, entries: int) -> None:
    if int(stream.length) + entries > stream.slots:
        raise ValueError(
            f"depth_scan: the layers write {entries} entries, but {stream.slots - int(stream.length)} of the stream's "
            f"{stream.slots} slots are free"
        )


class _Layer:
    """One layer of the loop: `run` it forward, or `reverse` it. Compared by value (static argument of `_loop`)."""

    def entries(self, params: PyTree, x: PyTree, stream: DepthStream, shared: tuple) -> int:
        """Slots that each layer fills; the stream's length is concrete."""
        raise NotImplementedError

    def run(self, params: PyTree, x: PyTree, stream: DepthStream, shared: tuple) -> tuple[PyTree, DepthStream, PyTree]:
        """(x, stream, what to store for `reverse`)."""
        raise NotImplementedError

    def reverse(
        self,
        params: PyTree,
        stored: PyTree,
        stream: DepthStream,
        shared: tuple,
        dx: PyTree,
        dkey: Array,
        dvalue: Array,
    ) -> tuple[PyTree, PyTree, Array, Array, tuple]:
        """(dparams, dx, dkey, dvalue, dshared); `stream` is the final buffer with this layer's length."""
        raise NotImplementedError


# Jitted by itself, so that a model that is called without jit compiles its loop once and not at every call.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _forward(layer: _Layer, unroll: bool, params, x, key, value, length, shared):
    """The loop itself; returns also what each layer stored and the length that it saw, stacked over layers."""

    def step(carry, params_l):
        x, stream = carry
        x, after, stored = layer.run(params_l, x, stream, shared)
        return (x, after), (stored, stream.length)

    (x, stream), stored = jax.lax.scan(step, (x, DepthStream(key, value, length)), params, unroll=unroll)
    # Unrolled, XLA would compute the slots that the backward reads again from the buffer before the last write, which
    # then has to be kept beside the final one.
    stream = jax.lax.optimization_barrier(stream)
    return (x, stream.key, stream.value, stream.length), stored


def _loop_forward(layer, unroll, gradient_dtype, params, x, key, value, length, shared):
    outputs, stored = _forward(layer, unroll, params, x, key, value, length, shared)
    return outputs, (params, stored, outputs[1], outputs[2], length, shared)


def _loop_backward(layer, unroll, gradient_dtype, residuals, cotangents):
    params, (stored, lengths), key, value, length, shared = residuals
    dx, dkey, dvalue, _ = cotangents
    stream_dtype = key.dtype
    inexact = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(shared)]
    dshared = [jnp.zeros_like(leaf) for leaf, keep in zip(jax.tree.leaves(shared), inexact, strict=True) if keep]

    def step(carry, layer_l):
        dx, dkey, dvalue, dshared = carry
        if unroll:
            # Forward and backward then stand in one computation, where XLA would take what is recomputed here for what
            # it has already, and keep that: all the memory that `remat` is there to save. With dx in the barrier no
            # layer is recomputed before its turn.
            layer_l, dx = jax.lax.optimization_barrier((layer_l, dx))
        params_l, stored_l, length_l = layer_l
        dparams, dx, dkey, dvalue, more = layer.reverse(
            params_l, stored_l, DepthStream(key, value, length_l), shared, dx, dkey, dvalue
        )
        more = [leaf for leaf, keep in zip(jax.tree.leaves(more), inexact, strict=True) if keep]
        return (dx, dkey, dvalue, [a + b for a, b in zip(dshared, more, strict=True)]), dparams

    carry = (dx, dkey.astype(gradient_dtype), dvalue.astype(gradient_dtype), dshared)
    (dx, dkey, dvalue, dshared), dparams = jax.lax.scan(
        step, carry, (params, stored, lengths), reverse=True, unroll=unroll
    )
    # What the layers wrote replaced the incoming contents of those slots.
    incoming = (jnp.arange(key.shape[2]) < length)[:, None, None]  # [S, 1, 1]
    dkey, dvalue = (jnp.where(incoming, d, 0).astype(stream_dtype) for d in (dkey, dvalue))
    sums = iter(dshared)
    no_gradient = [
        next(sums) if keep else np.zeros(leaf.shape, jax.dtypes.float0)
        for leaf, keep in zip(jax.tree.leaves(shared), inexact, strict=True)
    ]
    dshared = jax.tree.unflatten(jax.tree.structure(shared), no_gradient)
    return dparams, dx, dkey, dvalue, np.zeros((), jax.dtypes.float0), dshared


def _loop_primal(layer, unroll, gradient_dtype, params, x, key, value, length, shared):
    return _forward(layer, unroll, params, x, key, value, length, shared)[0]


_loop = jax.custom_vjp(_loop_primal, nondiff_argnums=(0, 1, 2))
_loop.defvjp(_loop_forward, _loop_backward)


@dataclasses.dataclass(frozen=True)
class _WholeLayer(_Layer):
    """Any block: stores the layer's input, recomputes the block, differentiates it with JAX's own autodiff."""

    block: Callable[..., tuple[PyTree, DepthStream]]

    def entries(self, params, x, stream, shared):
        params_l = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
        counts = []

        def one(params, x, key, value, shared):
            x_out, after = self.block(params, x, DepthStream(key, value, stream.length), *shared)
            if is_traced(after.length):
                raise ValueError(
                    "depth_scan: the block appends a traced number of entries, expected one known in Python"
                )
            counts.append(int(after.length) - int(stream.length))
            return x_out

        after = jax.eval_shape(one, params_l, x, stream.key, stream.value, shared)
        expected, came = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (x, after))
        if expected != came:
            raise ValueError(
                f"depth_scan: the block returned x with (shape, dtype) {came}, expected its input's {expected}"
            )
        return counts[0]

    def run(self, params, x, stream, shared):
        x_out, after = self.block(params, x, stream, *shared)
        return x_out, after, x

    def reverse(self, params, stored, stream, shared, dx, dkey, dvalue):
        def one(params, x, key, value, shared):
            x_out, after = self.block(params, x, DepthStream(key, value, stream.length), *shared)
            return (x_out, after.key, after.value), after.length

        _, vjp, length_after = jax.vjp(one, params, stored, stream.key, stream.value, shared, has_aux=True)
        # Only this layer's own slots go in, so that what comes out is its contribution alone and adds in any dtype.
        slot = jnp.arange(stream.slots)
        own = ((slot >= stream.length) & (slot < length_after))[:, None, None]  # [S, 1, 1]
        own_dkey, own_dvalue = (jnp.where(own, d, 0).astype(stream.key.dtype) for d in (dkey, dvalue))
        dparams, dx, dkey_l, dvalue_l, dshared = vjp((dx, own_dkey, own_dvalue))
        return dparams, dx, dkey + dkey_l.astype(dkey.dtype), dvalue + dvalue_l.astype(dvalue.dtype), dshared


@dataclasses.dataclass(frozen=True)
class _PartedLayer(_Layer):
    """A `PartedBlock`: keeps what `stored` names; the op's backward adds into the stream's gradient directly."""

    block: PartedBlock
    stored: Stored
    reread: bool  # (key, value) stand in the layer's first slot, so they need not be kept

    def entries(self, params, x, stream, shared):
        return self.block.entries_per_layer

    def run(self, params, x, stream, shared):
        params = self.block.prepare(params)
        query, key, value, before = self._before(params, x, shared)
        attended, lse = self._attend(query, key, value, stream, shared)
        # The op reads the buffer before this layer writes to it. XLA does not see that by itself where the entry is the
        # layer's own KV, which exists before the op has run: in an unrolled loop it would copy the buffer per layer.
        attended, stream = jax.lax.optimization_barrier((attended, stream))
        x_out, entries, after = self._after(params, x, key, value, attended, shared)
        stored = {"x": x}
        if self.stored.attention:
            stored |= {"attended": attended, "lse": lse}
        if self.stored.parts:
            stored |= {"query": query} if self.reread else {"query": query, "key": key, "value": value}
            stored["before"] = _StoredVjp.of(before, (params, x, shared))
            stored["after"] = _StoredVjp.of(after, (params, x, key, value, attended, shared))
        for entry_key, entry_value in entries:
            stream = DepthStream(
                write_slot(stream.key, entry_key, stream.length),
                write_slot(stream.value, entry_value, stream.length),
                stream.length_after(1),
            )
        return x_out, stream, stored

    def reverse(self, params, stored, stream, shared, dx, dkey, dvalue):
        x = stored["x"]
        params, prepared = jax.vjp(self.block.prepare, params)
        if self.stored.parts:
            query, key, value = (stored.get(name) for name in ("query", "key", "value"))
        else:
            query, key, value, before = self._before(params, x, shared)
        if self.reread:
            key, value = read_slot(stream.key, stream.length), read_slot(stream.value, stream.length)
        if self.stored.attention:
            attended, lse = stored["attended"], stored["lse"]
        else:
            attended, lse = self._attend(query, key, value, stream, shared)
        if self.stored.parts:
            before = stored["before"].restore((params, x, shared))
            after = stored["after"].restore((params, x, key, value, attended, shared))
        else:
            _, _, after = self._after(params, x, key, value, attended, shared)

        dentries = tuple(
            tuple(read_slot(d, stream.length_after(i)).astype(stream.key.dtype) for d in (dkey, dvalue))
            for i in range(self.block.entries_per_layer)
        )
        # As in `run`, the other way round: this layer's slots are read before the op's backward adds to the others.
        dentries, dkey, dvalue = jax.lax.optimization_barrier((dentries, dkey, dvalue))
        dparams_after, dx_after, dkey_after, dvalue_after, dattended, dshared_after = after((dx, dentries))
        delta = jnp.sum(dattended.astype(jnp.float32) * attended.astype(jnp.float32), axis=-1)  # [B, T, N]
        dquery, dkey_op, dvalue_op, dkey_sum, dvalue_sum = attention_backward(
            query, key, value, *_depth(stream), self.block.segment_ids(*shared), dattended, lse, delta,
            dkey if stream.slots else None, dvalue if stream.slots else None, self._options(query),
        )  # fmt: skip
        if stream.slots:
            dkey, dvalue = dkey_sum, dvalue_sum
        dparams_before, dx_before, dshared_before = before((dquery, dkey_op + dkey_after, dvalue_op + dvalue_after))
        return (
            prepared(_add(dparams_after, dparams_before))[0],
            _add(dx_after, dx_before),
            dkey,
            dvalue,
            _add(dshared_after, dshared_before),
        )

    def _before(self, params, x, shared):
        """(query, key, value, vjp of the part before the op)."""
        (query, key, value), vjp = jax.vjp(
            lambda params, x, shared: self.block.before(params, x, *shared), params, x, shared
        )
        return query, key, value, vjp

    def _after(self, params, x, key, value, attended, shared):
        """(x, entries, vjp of the part after the op)."""

        def after(params, x, key, value, attended, shared):
            return self.block.after(params, x, key, value, attended, *shared)

        (x_out, entries), vjp = jax.vjp(after, params, x, key, value, attended, shared)
        if len(entries) != self.block.entries_per_layer:
            raise ValueError(
                f"depth_scan: `after` returned {len(entries)} entries, expected entries_per_layer="
                f"{self.block.entries_per_layer}"
            )
        return x_out, entries, vjp

    def _attend(self, query, key, value, stream, shared):
        """The op's (output, lse)."""
        return attention_forward(
            query, key, value, *_depth(stream), self.block.segment_ids(*shared), self._options(query)
        )

    def _options(self, query) -> Options:
        scale = query.shape[-1] ** -0.5 if self.block.scale is None else self.block.scale
        return Options(scale, self.block.implementation)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kept"], meta_fields=["treedef", "sources"])
@dataclasses.dataclass(frozen=True)
class _StoredVjp:
    """A vjp function as what has to be stored of it: its arrays, less those that the reverse loop has anyway.

    A vjp function is a pytree whose leaves are the arrays that it keeps. Many are the very inputs of the part (weights,
    the layer's input, attention's output); storing those per layer would copy them, the weights above all.
    """

    kept: list[Array]
    treedef: Any
    sources: tuple[int | None, ...]  # per leaf: index into the inputs' leaves, or None: kept

    @classmethod
    def of(cls, vjp: Callable, inputs: PyTree) -> _StoredVjp:
        """What to store of `vjp`, traced in the same loop body as `inputs`."""
        index = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(inputs))}
        leaves, treedef = jax.tree.flatten(vjp)
        sources = tuple(index.get(id(leaf)) for leaf in leaves)
        return cls([leaf for leaf, source in zip(leaves, sources, strict=True) if source is None], treedef, sources)

    def restore(self, inputs: PyTree) -> Callable:
        """The vjp function again, from what was kept and the same inputs."""
        kept, known = iter(self.kept), jax.tree.leaves(inputs)
        return jax.tree.unflatten(self.treedef, [next(kept) if i is None else known[i] for i in self.sources])


def _depth(stream: DepthStream) -> tuple[Array | None, Array | None, Array | np.int32 | None]:
    """The op's depth operands: none for a stream without slots, which is plain attention."""
    return (stream.key, stream.value, stream.length) if stream.slots else (None, None, None)


def _add(a: PyTree, b: PyTree) -> PyTree:
    """Leafwise sum; integer leaves have no gradient (dtype float0) and pass through."""
    return jax.tree.map(lambda a, b: a if a.dtype == jax.dtypes.float0 else a + b, a, b)
