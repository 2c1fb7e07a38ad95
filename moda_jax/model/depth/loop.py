"""The layer loop: runs stacked layers over one depth stream with O(S) memory, forward and backward.

Plain autodiff through a loop whose carry is the depth buffer keeps one copy of the buffer per layer, O(S^2) in all.
Slots are written once and never change, so the *final* buffer holds what every layer read: a read's view is the final
buffer with the length that it had then. The reverse loop therefore keeps that one buffer and carries one gradient
buffer, which

1. hands a layer the gradient of the entries that it wrote (its slots, complete once all later reads are reversed),
2. receives in place what a read contributes to the slots of earlier writers.

The second can wait where a gradient is not wanted yet. Layers may go in groups: each then adds to the slots of its own
group alone, and when the group's first layer is done, one pass adds what all of them contribute to the slots before it,
so that the buffer is read and written once for a group. What waits is what an operation needs for that (attention: its
query and the gradient of its output). See `Operation.backward_deferred`.

Per layer only what `remat` names is stored, never the buffer.

Two kinds of block:

- any function `block(params, x, stream, *shared) -> (x, stream)`, or (x, stream, aux): its backward recomputes the
  whole block from its input, and makes a gradient of all slots in every layer;
- a `Layer`, cut at every operation on the stream, so that the operations' results can be kept and not be computed
  again, and their backward adds into the gradient buffers directly. `PartedBlock` is the short form of one with a
  single cut, at the attention op.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from moda_jax.model.depth.cut_layer import Layer, PartedBlock
from moda_jax.model.depth.kept import Places, Residuals, differentiated
from moda_jax.model.depth.stream import Stream, is_traced, read_slot

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Stored:
    """What the forward loop keeps per layer, besides the layer's input: the meaning of a `remat` name."""

    results: (
        bool  # what the operations returned: attention's output [B, T, N, H] and lse [B, T, N], reads of the stream
    )
    parts: bool  # everything that autodiff of the parts between the operations needs


REMAT = {
    "full": Stored(results=False, parts=False),
    "attention": Stored(results=True, parts=False),
    "ffn": Stored(results=True, parts=True),  # the FFN itself then keeps less: see `moda_jax.model.activations.swiglu`
    "none": Stored(results=True, parts=True),
}


def depth_scan(
    block: Callable[..., tuple[PyTree, Stream]] | PartedBlock | Layer,
    params: PyTree,
    x: PyTree,
    stream: Stream,
    *shared: PyTree,
    remat: str = "attention",
    unroll: bool = False,
    gradient_dtype: jnp.dtype | str | None = None,
    gradient_group: int | None = None,
    check: bool = False,
) -> tuple[PyTree, Stream] | tuple[PyTree, Stream, PyTree]:
    """Runs a stack of layers, each reading and appending to the depth stream, with memory linear in the slots.

    Args:
        block: `block(params_of_one_layer, x, stream, *shared) -> (x, stream)`, or `(x, stream, aux)`, which changes the
            stream by `append` only, in every layer as often; or a `PartedBlock` or `Layer`. Everything that is
            differentiated must come in through the arguments.
        params: arrays stacked over layers: leading axis L on every leaf.
        x: the first layer's input, an array or pytree; every layer returns the same shapes and dtypes.
        stream: what came before; enough free slots for all layers.
        *shared: given to every layer unchanged (positions, segment ids, ...); gradients of the layers are summed.
        remat: for a `PartedBlock`, what is stored per layer for the backward pass: "full": the layer's input alone, all
            else is recomputed; "attention": also attention's output and lse, so that attention's forward is not run
            again; "none": all that autodiff of the parts needs; "ffn": the same here, `Transformer`'s blocks then
            compute the FFN's hidden activations again. Other blocks are always recomputed from their input.
        unroll: compile every layer by itself instead of one loop body: on a GPU faster to run (nothing is copied into
            stacks over layers and out of them), slower to compile; the memory is the same. For a CPU XLA orders the
            reverse pass of unrolled layers as it likes: reads of a stream by sums may then hold O(S^2).
        gradient_dtype: dtype in which the stream's gradient accumulates over the layers; None: the stream's.
        gradient_group: how many layers add their gradients of older slots together, where operations can let them
            wait; None: as many as the operations ask for (`Operation.gradient_group`), which on a CPU is 1.
        check: also check, while it runs, that no entry was lost for want of a slot and that the block left the slots
            of others as they were. The call has to be under `jax.experimental.checkify.checkify`, which reports it.

    Returns:
        The last layer's output and the stream with all entries; if the block has auxiliary outputs also these, stacked
        over the layers as `jax.lax.scan` does. Under a traced length an overflow leaves the filled slots as they are,
        loses the entries that find no slot, and shows in the returned length, which is then more than the slots.

    Raises:
        ValueError: an unknown `remat`, a `gradient_group` below 1, params without a common leading axis, a value in x
            or shared that is no array or number, a block that returns other shapes or dtypes or fewer entries than it
            got, or not enough free slots (when the stream's length is concrete).
    """
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r}: expected one of {tuple(REMAT)}")
    if gradient_group is not None and gradient_group < 1:
        raise ValueError(f"gradient_group={gradient_group!r}: expected None or a number of layers, at least 1")
    leading = {leaf.shape[:1] for leaf in jax.tree.leaves(params)}
    if len(leading) != 1 or leading == {()}:
        raise ValueError(
            f"depth_scan: params must share one leading axis of layers, got leading sizes {sorted(leading)}"
        )
    ((num_layers,),) = leading
    params, x, shared = (_arrays(name, tree) for name, tree in (("params", params), ("x", x), ("shared", shared)))
    if isinstance(block, PartedBlock):
        block = block.layer()
    if isinstance(block, Layer):
        # An overflowing stream holds no entry to read again, and under a traced length nobody knows.
        kept = dataclasses.replace(block, reread=()) if is_traced(stream.length) else block
        looped: _Looped = _CutLayer(kept, REMAT[remat], keeps_own=unroll and remat == "none")
    else:
        # Layers are compared by value, to compile once; a callable that has no hash is its own value.
        looped = _WholeLayer(block if isinstance(block, Hashable) else lambda *arguments: block(*arguments), check)
    options = _Options(
        unroll, None if gradient_dtype is None else jnp.dtype(gradient_dtype), gradient_group,
        starts_empty=not is_traced(stream.length) and int(stream.length) == 0,
    )  # fmt: skip
    length = None
    entries, has_aux = looped.inspect(params, x, stream, shared)
    if entries is not None and not is_traced(stream.length):  # inside the loop it is traced; out here it stays concrete
        _check_capacity(stream, num_layers * entries)
        length = stream.length_after(num_layers * entries)
        looped = looped.that_fits()
    x, after, (aux, kept) = _loop(looped, options, params, x, stream.with_length(jnp.int32(stream.length)), shared)
    if check:
        checkify.check(
            after.length <= stream.slots,
            f"depth_scan: {{length}} entries, but the stream has {stream.slots} slots: some are lost",
            length=after.length,
        )
        if kept is not None:
            checkify.check(
                jnp.all(kept), "depth_scan: layer {layer} changed a slot that was filled before", layer=jnp.argmin(kept)
            )
    after = after if length is None else after.with_length(length)
    return (x, after, aux) if has_aux else (x, after)


def _arrays(name: str, tree: PyTree) -> PyTree:
    """The tree with arrays for its Python numbers, which would pass forward and have no gradient's dtype."""

    def array(path: tuple, leaf: Any) -> Array:
        if isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
            return jnp.asarray(leaf)
        raise ValueError(f"depth_scan: {name}{jax.tree_util.keystr(path)}={leaf!r}: expected an array or a number")

    return jax.tree.map_with_path(array, tree)


def _check_capacity(stream: Stream, entries: int) -> None:
    if int(stream.length) + entries > stream.slots:
        raise ValueError(
            f"depth_scan: the layers write {entries} entries, but {stream.slots - int(stream.length)} of the stream's "
            f"{stream.slots} slots are free"
        )


@dataclasses.dataclass(frozen=True)
class _Options:
    """How the loop runs: `depth_scan`'s arguments of these names, and whether its stream is known to be empty."""

    unroll: bool
    gradient_dtype: jnp.dtype | None
    gradient_group: int | None
    starts_empty: bool


class _Looped:
    """One layer of the loop: `run` it forward, or `reverse` it. Compared by value (static argument of `_loop`)."""

    numbered = False

    def that_fits(self) -> _Looped:
        """The same, where every entry is known to find a slot."""
        return self

    def inspect(self, params: PyTree, x: PyTree, stream: Stream, shared: tuple) -> tuple[int | None, bool]:
        """Looks at one layer without running it.

        Returns:
            Slots that each layer fills, None where that is not known; whether it has auxiliary outputs.
        """
        raise NotImplementedError

    def run(
        self, params: PyTree, x: PyTree, stream: Stream, number: Array | None, shared: tuple
    ) -> tuple[PyTree, Stream, tuple[PyTree, Array | None], PyTree]:
        """(x, stream, (aux, whether the filled slots are as they were), what to store for `reverse`)."""
        raise NotImplementedError

    def reverse(
        self,
        params: PyTree,
        stored: PyTree,
        stream: Stream,
        number: Array | None,
        shared: tuple,
        dx: PyTree,
        daux: PyTree,
        dbuffers: tuple[Array, ...],
        first: Array | None,
    ) -> tuple[PyTree, PyTree, tuple[Array, ...], tuple, PyTree]:
        """(dparams, dx, dbuffers, dshared, what waits); `stream` is the final one with the length that this layer
        found. What goes to slots before `first` may wait; None: nothing may."""
        raise NotImplementedError

    def gradient_group(self, stored: PyTree) -> int:
        """How many layers had better go together, by what `run` gave to store."""
        del stored
        return 1

    def add_waiting(self, waiting: list[PyTree], stream: Stream, dbuffers: tuple[Array, ...]) -> tuple[Array, ...]:
        """`dbuffers` with what waits of a group of layers; `stream` has the length `first`."""
        del waiting, stream
        return dbuffers


# Jitted by itself, so that a model that is called without jit compiles its loop once and not at every call.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _forward(looped: _Looped, unroll: bool, params, x, stream, shared):
    """The loop itself; returns also what each layer stored and the length that it found, stacked over layers."""

    def step(carry, params_l):
        x, stream = carry
        params_l, number = params_l if looped.numbered else (params_l, None)
        x, after, left, stored = looped.run(params_l, x, stream, number, shared)
        return (x, after), (left, (stored, stream.length))

    given, stream = stream, stream.bare()
    (x, stream), (left, stored) = jax.lax.scan(step, (x, stream), _per_layer(looped, params), unroll=unroll)
    # Unrolled, XLA would compute the slots that the backward reads again from the buffer before the last write, which
    # then has to be kept beside the final one.
    stream = jax.lax.optimization_barrier(stream)
    return (x, stream.with_gradients_of(given), left), stored


def _per_layer(looped: _Looped, params: PyTree) -> PyTree:
    """What the loop takes apart: the parameters, with the layers' numbers if they are asked for."""
    if not looped.numbered:
        return params
    return params, jnp.arange(jax.tree.leaves(params)[0].shape[0], dtype=jnp.int32)


def _loop_forward(looped, options, params, x, stream, shared):
    outputs, stored = _forward(looped, options.unroll, params, x, stream, shared)
    return outputs, (params, stored, outputs[1], stream.length, shared)


def _loop_backward(looped, options, residuals, cotangents):
    params, (stored, lengths), given, length, shared = residuals
    dx, dstream, (daux, _) = cotangents
    stream = given.bare()
    inexact = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(shared)]
    dshared = [jnp.zeros_like(leaf) for leaf, keep in zip(jax.tree.leaves(shared), inexact, strict=True) if keep]

    layers = (_per_layer(looped, params), stored, lengths, daux)
    together = min(options.gradient_group or looped.gradient_group(stored), lengths.shape[0])

    def reverse(carry, layer_l, first=None):
        dx, dbuffers, dshared = carry
        if options.unroll or first is not None:
            # Forward and backward then stand in one computation, where XLA would take what is recomputed here for what
            # it has already, and keep that: all the memory that `remat` is there to save. With dx in the barrier no
            # layer is recomputed before its turn.
            layer_l, dx = jax.lax.optimization_barrier((layer_l, dx))
        params_l, stored_l, length_l, daux_l = layer_l
        params_l, number = params_l if looped.numbered else (params_l, None)
        dparams, dx, dbuffers, more, waiting = looped.reverse(
            params_l, stored_l, stream.with_length(length_l), number, shared, dx, daux_l, dbuffers, first
        )
        more = [leaf for leaf, keep in zip(jax.tree.leaves(more), inexact, strict=True) if keep]
        return (dx, dbuffers, [a + b for a, b in zip(dshared, more, strict=True)]), (dparams, waiting)

    def reverse_group(at_start, carry, group):
        """Layers that stand one after the other, the first of all or not; returns their dparams as a list."""
        first = group[0][2] if len(group) > 1 else None
        gradients, waiting = [], []
        for layer_l in reversed(group):
            carry, (dparams, left) = reverse(carry, layer_l, first)
            gradients.insert(0, dparams)
            waiting.insert(0, left)
        if first is not None and not (at_start and options.starts_empty):
            dx, dbuffers, dshared = carry
            carry = dx, looped.add_waiting(waiting, stream.with_length(first), dbuffers), dshared
        return carry, gradients

    dtypes = [d.dtype for d in dstream.differentiated]
    dbuffers = tuple(d.astype(options.gradient_dtype or d.dtype) for d in dstream.differentiated)
    carry = dx, dbuffers, dshared
    if together == 1:
        alone = functools.partial(_alone, reverse)
        carry, dparams = jax.lax.scan(alone, carry, layers, reverse=True, unroll=options.unroll)
    else:
        carry, dparams = _reverse_groups(reverse_group, carry, layers, params, together, options.unroll)
    dx, dbuffers, dshared = carry
    # What the layers wrote replaced the incoming contents of those slots.
    dbuffers = tuple(
        jnp.where(_slots(d, jnp.arange(d.shape[2], dtype=jnp.int32) < length), d, 0).astype(dtype)
        for d, dtype in zip(dbuffers, dtypes, strict=True)
    )
    sums = iter(dshared)
    no_gradient = [
        next(sums) if keep else np.zeros(leaf.shape, jax.dtypes.float0)
        for leaf, keep in zip(jax.tree.leaves(shared), inexact, strict=True)
    ]
    dshared = jax.tree.unflatten(jax.tree.structure(shared), no_gradient)
    return dparams, dx, given.cotangent(dbuffers), dshared


def _reverse_groups(reverse_group, carry, layers, params, together, unroll):
    """The reverse loop over groups of layers. The layers that are left over are the first ones: their group defers
    nothing, or little, and the others' older slots are then fewest.

    Args:
        reverse_group: (whether it is the first group, carry, a list of layers) -> (carry, a list of their dparams).
        layers: what the loop takes apart, stacked over the layers. params: the parameters alone.
        together: layers of a group. unroll: one after the other instead of one loop body.

    Returns:
        The carry, and dparams stacked over the layers.
    """
    reverse_group = jax.jit(reverse_group, static_argnums=0, inline=True)  # traced once for all groups of a size
    count = jax.tree.leaves(params)[0].shape[0]
    left_over = count % together

    def at(first: Array | int, number: int) -> list[PyTree]:
        index = jax.lax.index_in_dim if isinstance(first, int) else jax.lax.dynamic_index_in_dim
        return [jax.tree.map(lambda leaf, i=i: index(leaf, first + i, keepdims=False), layers) for i in range(number)]

    if unroll:
        gradients: list[PyTree] = []
        for first in reversed(range(left_over, count, together)):
            carry, more = reverse_group(first == 0, carry, at(first, together))
            gradients = [*more, *gradients]
        if left_over:
            carry, more = reverse_group(True, carry, at(0, left_over))
            gradients = [*more, *gradients]
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)

    def put(stacked: PyTree, first: Array | int, more: list[PyTree]) -> PyTree:
        for i, dparams in enumerate(more):
            stacked = jax.tree.map(
                lambda s, d, i=i: jax.lax.dynamic_update_index_in_dim(s, d, first + i, axis=0), stacked, dparams
            )
        return stacked

    def one_group(state, first):
        carry, stacked = state
        carry, more = reverse_group(False, carry, at(first, together))
        return (carry, put(stacked, first, more)), None

    # The gradients are put in their places, not stacked by the scan: beside what is left over they would be copied.
    firsts = jnp.arange(left_over, count, together, dtype=jnp.int32)
    (carry, stacked), _ = jax.lax.scan(one_group, (carry, jax.tree.map(jnp.zeros_like, params)), firsts, reverse=True)
    if left_over:
        carry, more = reverse_group(True, carry, at(0, left_over))
        stacked = put(stacked, 0, more)
    return carry, stacked


def _alone(reverse, carry, layer_l):
    """One layer's reverse, in no group: nothing waits."""
    carry, (dparams, _) = reverse(carry, layer_l)
    return carry, dparams


def _loop_primal(looped, options, params, x, stream, shared):
    return _forward(looped, options.unroll, params, x, stream, shared)[0]


_loop = jax.custom_vjp(_loop_primal, nondiff_argnums=(0, 1))
_loop.defvjp(_loop_forward, _loop_backward)


def _slots(buffer: Array, mask: Array) -> Array:
    """A mask [S] of slots, to be broadcast to `buffer` [B, T, S, ...]."""
    return mask.reshape(-1, *(1,) * (buffer.ndim - 3))


@dataclasses.dataclass(frozen=True)
class _WholeLayer(_Looped):
    """Any block: stores the layer's input, recomputes the block, differentiates it with JAX's own autodiff."""

    block: Callable[..., tuple]
    check: bool = False  # compare the filled slots before and after the block

    def inspect(self, params, x, stream, shared):
        found = []

        def one(params, x, buffers, shared):
            x_out, after, aux = self._call(params, x, stream.with_buffers(buffers, stream.length), shared)
            if not is_traced(stream.length) and is_traced(after.length):
                raise ValueError(
                    "depth_scan: the block appends a traced number of entries, expected one known in Python"
                )
            entries = None if is_traced(stream.length) else int(after.length) - int(stream.length)
            found.append((entries, aux is not None))
            return x_out, after.buffers

        params_l = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
        x_out, buffers = jax.eval_shape(one, params_l, x, stream.buffers, shared)
        _require_same("x", x_out, x)
        _require_same("a stream", buffers, stream.buffers)
        ((entries, has_aux),) = found
        if entries is not None and entries < 0:
            raise ValueError(
                f"depth_scan: the block returned a stream of length {int(stream.length) + entries}, expected at least "
                f"its input's {int(stream.length)}"
            )
        return entries, has_aux

    def run(self, params, x, stream, number, shared):
        x_out, after, aux = self._call(params, x, stream, shared)
        kept = None
        if self.check:
            kept = after.length >= stream.length
            for old, new in zip(stream.buffers, after.buffers, strict=True):
                filled = _slots(old, jnp.arange(old.shape[2], dtype=jnp.int32) < stream.length)
                kept &= jnp.all(jnp.where(filled, (old == new) | ((old != old) & (new != new)), True))  # NaN is NaN
        return x_out, after, (aux, kept), x

    def reverse(self, params, stored, stream, number, shared, dx, daux, dbuffers, first):
        def one(params, x, arrays, shared):
            x_out, after, aux = self._call(params, x, stream.with_differentiated(arrays), shared)
            return (x_out, after.differentiated, aux), after.length

        arrays = stream.differentiated
        _, vjp, length_after = jax.vjp(one, params, stored, arrays, shared, has_aux=True)
        # Only this layer's own slots go in, so that what comes out is its contribution alone and adds in any dtype.
        own_dbuffers = []
        for d, buffer in zip(dbuffers, arrays, strict=True):
            slot = jnp.arange(buffer.shape[2], dtype=jnp.int32)
            own = (slot >= stream.length) & (slot < length_after)
            own_dbuffers.append(jnp.where(_slots(buffer, own), d, 0).astype(buffer.dtype))
        dparams, dx, more, dshared = vjp((dx, tuple(own_dbuffers), daux))
        return dparams, dx, tuple(d + m.astype(d.dtype) for d, m in zip(dbuffers, more, strict=True)), dshared, ()

    def _call(self, params, x, stream, shared) -> tuple[PyTree, Stream, PyTree]:
        """(x, stream, aux), aux None if the block has none."""
        returned = self.block(params, x, stream, *shared)
        if not (isinstance(returned, tuple) and len(returned) in (2, 3)):
            raise ValueError(
                f"depth_scan: the block returned {type(returned).__name__}, expected (x, stream) or (x, stream, aux)"
            )
        x_out, after, *aux = returned
        if type(after) is not type(stream):
            raise ValueError(
                f"depth_scan: the block returned a {type(after).__name__} as stream, expected {type(stream).__name__}"
            )
        return x_out, after, aux[0] if aux else None


def _require_same(name: str, came: PyTree, expected: PyTree) -> None:
    """A block returns the shapes and dtypes that it got."""
    came, expected = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (came, expected))
    if came != expected:
        raise ValueError(
            f"depth_scan: the block returned {name} with (shape, dtype) {came}, expected its input's {expected}"
        )


@dataclasses.dataclass(frozen=True)
class _CutLayer(_Looped):
    """A `Layer`: keeps what `stored` names; its operations' backward adds into the stream's gradient directly.

    Attributes:
        layer, stored: see there.
        keeps_own: of `Layer.reread`, the values themselves are kept beside their slots. Unrolled layers that keep all
            else do: a slot's 1 KB a token is read at half of the speed of memory and written once more, where a value
            that stays costs nothing but its place. In stacks over layers it would be copied as often.
        fits: every entry finds a slot.
    """

    layer: Layer
    stored: Stored
    keeps_own: bool = False
    fits: bool = False

    @property
    def numbered(self) -> bool:
        return self.layer.numbered

    def that_fits(self):
        return dataclasses.replace(self, fits=True)

    def inspect(self, params, x, stream, shared):
        counts = []

        def one(params, x, buffers, shared):
            found = stream.with_buffers(buffers, jnp.int32(0))
            x_out, _, _, stored = self.run(params, x, found, jnp.int32(0), shared)
            places = stored["places"]
            counts.append(sum(places.counts) if places.slots is None else None)
            return x_out

        params_l = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
        _require_same("x", jax.eval_shape(one, params_l, x, stream.buffers, shared), x)
        return counts[0], self.layer.has_aux

    def run(self, params, x, stream, number, shared):
        layer, parts = self.layer, self.layer.parts
        params = layer.prepare(params)
        values, results, saved, vjps = {"x": x, "layer": number}, {}, [], []
        written, lengths, wanted = [], [], 1
        for i, part in enumerate(parts):
            given, entries, vjp = differentiated(part, params, values, shared)
            values |= given
            vjps.append(vjp)
            slots = []
            for entry in entries:
                slots.append((stream.slot_of(entry.when), entry.when is None))
                stream = stream.write(entry, fits=self.fits)
            written.append(tuple(slots))
            if i < len(layer.cuts):
                cut = layer.cuts[i]
                lengths.append(stream.length)
                request = tuple(values[name] for name in cut.takes)
                wanted = max(wanted, cut.operation.gradient_group(request, stream, shared))
                result, save = cut.operation.forward(request, stream, shared)
                # The operation reads the buffers before this layer writes to them. XLA does not see that by itself
                # where the entry is the layer's own KV, which exists before attention has run: in an unrolled loop it
                # would copy the buffer per layer.
                result, stream = jax.lax.optimization_barrier((result, stream))
                values[cut.gives] = results[cut.gives] = result
                saved.append(save)
        stored = {"x": x, "places": Places.of(written, lengths, wanted)}
        if self.stored.results:
            stored |= {"results": results, "saved": saved}
        if self.stored.parts:
            requests = [tuple(values[name] for name in cut.takes) for cut in layer.cuts]
            reread = [] if self.keeps_own else [values[name] for name, _, _ in layer.reread]
            known = (params, x, number, shared, results, saved, reread)
            stored["residuals"] = Residuals.of((vjps, requests), known)
        return values["output"], stream, (values.get("aux"), None), stored

    def gradient_group(self, stored):
        return stored["places"].gradient_group

    def add_waiting(self, waiting, stream, dbuffers):
        for i, cut in enumerate(self.layer.cuts):
            left = [layer_l[i] for layer_l in waiting]
            if left[0] is not None:  # in one layer as in all
                dbuffers = cut.operation.add_deferred(left, stream, dbuffers)
        return dbuffers

    def reverse(self, params, stored, stream, number, shared, dx, daux, dbuffers, first):
        layer, parts, places = self.layer, self.layer.parts, stored["places"]
        params, prepared = jax.vjp(layer.prepare, params)
        reread = {
            name: read_slot(stream.buffers[buffer], stream.length_after(entry), fits=self.fits)
            for name, buffer, entry in (() if self.keeps_own else layer.reread)
        }
        if self.stored.parts:
            results, saved = stored["results"], stored["saved"]
            known = (params, stored["x"], number, shared, results, saved, list(reread.values()))
            vjps, requests = stored["residuals"].restore(known)
        else:
            vjps, requests, results, saved = self._replay(params, stored, stream, number, shared, reread)

        # Gradients of values that stand in the stream: not by way of the part that writes them, but added where they
        # are used. The operations of the layer, which are reversed before that, leave its own slots alone.
        in_stream = {name: (buffer, stream.length_after(entry)) for name, buffer, entry in layer.reread}
        standing = {(buffer, entry) for _, buffer, entry in layer.reread}
        dvalues = {"output": dx, "aux": daux}
        dparams = dshared = None
        waiting = [None] * len(layer.cuts)
        fits = self.fits and places.slots is None  # the number of a slot that there is not stands for no entry
        written = sum(places.counts)
        for i in reversed(range(len(parts))):
            written -= places.counts[i]

            def dslot(buffer: int, slot: Array, entry: int | None = None) -> Array:
                d = read_slot(dbuffers[buffer], slot, fits=fits).astype(stream.entry_dtypes[buffer])  # noqa: B023
                return jnp.zeros_like(d) if (buffer, entry) in standing else d

            dentries = tuple(
                tuple(dslot(buffer, slot, written + j) for buffer in range(len(dbuffers)))
                for j, slot in enumerate(places.slots_of(i, stream))
            )
            dgiven = {name: dvalues.pop(name) for name in parts[i].gives}
            sums = {name: _add(dgiven[name], dslot(*in_stream[name])) for name in dgiven if name in in_stream}
            if dentries or sums:
                # As in `run`, the other way round: a layer's slots are read before the backward of its next operation
                # adds to the others.
                (dentries, sums), dbuffers = jax.lax.optimization_barrier(((dentries, sums), dbuffers))
            more, dtaken, dshared_more = vjps[i]((dgiven | sums, dentries))
            dparams = more if dparams is None else _add(dparams, more)
            dshared = dshared_more if dshared is None else _add(dshared, dshared_more)
            for name, d in dtaken.items():
                dvalues[name] = _add(dvalues[name], d) if name in dvalues else d
            if i > 0:
                cut = layer.cuts[i - 1]
                arguments = (
                    requests[i - 1], results[cut.gives], saved[i - 1], places.stream_at(i - 1, stream), shared,
                    dvalues.pop(cut.gives), dbuffers,
                )  # fmt: skip
                if first is None:
                    drequest, dbuffers = cut.operation.backward(*arguments)
                else:
                    drequest, dbuffers, waiting[i - 1] = cut.operation.backward_deferred(*arguments, first)
                for name, d in zip(cut.takes, drequest, strict=True):
                    dvalues[name] = _add(dvalues[name], d) if name in dvalues else d
        return prepared(dparams)[0], dvalues["x"], dbuffers, dshared, waiting

    def _replay(self, params, stored, stream, number, shared, reread):
        """(vjps of the parts, requests, results, saved), computed again but for what is stored."""
        layer, places = self.layer, stored["places"]
        values, vjps, requests = {"x": stored["x"], "layer": number}, [], []
        results, saved = stored.get("results", {}), stored.get("saved", [])
        for i, part in enumerate(layer.parts):
            given, _, vjp = differentiated(part, params, values, shared)
            values |= given
            values |= {name: value for name, value in reread.items() if name in given}
            vjps.append(vjp)
            if i < len(layer.cuts):
                cut = layer.cuts[i]
                requests.append(tuple(values[name] for name in cut.takes))
                if not self.stored.results:
                    result, save = cut.operation.forward(requests[-1], places.stream_at(i, stream), shared)
                    results, saved = results | {cut.gives: result}, [*saved, save]
                values[cut.gives] = results[cut.gives]
        return vjps, requests, results, saved


def _add(a: PyTree, b: PyTree) -> PyTree:
    """Leafwise sum; integer leaves have no gradient (dtype float0) and pass through."""
    return jax.tree.map(lambda a, b: a if a.dtype == jax.dtypes.float0 else a + b, a, b)
