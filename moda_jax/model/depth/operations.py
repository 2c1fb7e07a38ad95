"""Operations: what a layer does with the depth stream (and with the sequence) between two of its parts.

The layer loop is cut at every operation. An operation has its own backward, which adds to the gradient of the stream's
buffers in place; so the stream stands in no stored vjp, and a layer costs no gradient of all slots.

Axes: B batch, T tokens, S depth slots, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moda_jax.model.depth.rounded_stream import RoundedDepthStream
from moda_jax.model.depth.stream import Stream, is_traced
from moda_jax.parallel.attention import attend, attention_backward, attention_forward, causal_mask
from pallas_kernels import dispatch
from pallas_kernels.operands import Call, DepthKV, Upstream
from pallas_kernels.parts import Part, delta

Array = jax.Array
PyTree = Any


class Operation:
    """The base: frozen dataclasses, compared by value. `forward` alone is enough; then JAX differentiates it."""

    def __call__(self, request: tuple, stream: Stream, shared: tuple) -> PyTree:
        """The result, differentiable by JAX in request and stream; outside of the layer loop."""
        return self.forward(request, stream, shared)[0]

    def forward(self, request: tuple, stream: Stream, shared: tuple) -> tuple[PyTree, PyTree]:
        """Computes the operation.

        Args:
            request: what the part before it asks with.
            stream: all that was written so far.
            shared: what every layer gets: see `depth_scan`.

        Returns:
            The result, and what `backward` needs of the forward besides its arguments and result.
        """
        raise NotImplementedError

    def backward(
        self,
        request: tuple,
        result: PyTree,
        saved: PyTree,
        stream: Stream,
        shared: tuple,
        dresult: PyTree,
        dbuffers: tuple[Array, ...],
    ) -> tuple[tuple, tuple[Array, ...]]:
        """The gradients.

        Args:
            request, stream, shared: as in `forward`.
            result, saved: what `forward` returned.
            dresult: the result's gradient.
            dbuffers: the gradients of the stream's buffers so far, of any float dtype.

        Returns:
            The request's gradient, and `dbuffers` with this operation's share added; unfilled slots get none.
        """
        del result, saved

        def run(request: tuple, buffers: tuple[Array, ...]) -> PyTree:
            return self.forward(request, stream.with_buffers(buffers, stream.length), shared)[0]

        _, vjp = jax.vjp(run, request, stream.entries)
        drequest, more = vjp(dresult)
        return drequest, tuple(d + m.astype(d.dtype) for d, m in zip(dbuffers, more, strict=True))

    def gradients(
        self, request: tuple, result: PyTree, saved: PyTree, stream: Stream, shared: tuple, dresult: PyTree
    ) -> tuple[tuple, tuple[Array, ...]]:
        """`backward` where nothing came before: the request's gradient, and that of the stream's entries."""
        zeros = tuple(jnp.zeros_like(array) for array in stream.differentiated)
        return self.backward(request, result, saved, stream, shared, dresult, zeros)

    def gradient_group(self, request: tuple, stream: Stream, shared: tuple) -> int:
        """How many layers had better have their gradients of older slots added together, by `add_deferred`."""
        del request, stream, shared
        return 1

    def backward_deferred(
        self,
        request: tuple,
        result: PyTree,
        saved: PyTree,
        stream: Stream,
        shared: tuple,
        dresult: PyTree,
        dbuffers: tuple[Array, ...],
        first: Array,
    ) -> tuple[tuple, tuple[Array, ...], PyTree]:
        """`backward`, but what it would add to slots before `first`, int32, may be left to `add_deferred`.

        Returns:
            As `backward`, then what `add_deferred` needs of this layer; None: nothing is left, as in the base.
        """
        del first
        return (*self.backward(request, result, saved, stream, shared, dresult, dbuffers), None)

    def add_deferred(self, waiting: list[PyTree], stream: Stream, dbuffers: tuple[Array, ...]) -> tuple[Array, ...]:
        """Adds what several layers left.

        Args:
            waiting: what their `backward_deferred` returned, none of it None.
            stream: with the length `first`.
            dbuffers: as in `backward`.
        """
        raise NotImplementedError


def filled_slots(stream: Stream) -> Array | Any:
    """How many slots an operation reads: the length, which is more than the slots where entries were lost."""
    return jnp.minimum(stream.length, stream.slots) if is_traced(stream.length) else stream.length


def no_segments(*shared: PyTree) -> None:
    """Of what every layer gets, the segment ids: there are none."""
    del shared


def second_of_shared(positions: Array, segment_ids: Array | None, *more: PyTree) -> Array | None:
    """Of what every layer of a `Stack` gets, the segment ids."""
    del positions, more
    return segment_ids


@dataclasses.dataclass(frozen=True)
class SoftmaxAttention(Operation):
    """Attention over the sequence and, under the same softmax, over the filled slots of a `DepthStream`.

    Its request is (query [B, T, N, H], key, value [B, T, K, H]), its result [B, T, N, H].

    Attributes:
        reads_slots: whether the slots are part of the softmax; False: plain attention, whatever the stream is.
        window: how many of the filled slots are, the last ones; None: all.
        chunk: C: also the slots of the earlier tokens of a token's chunk of C; 1: its own alone.
        segment_ids: (*shared) -> [B, T] int32 or None, the mask.
        scale: of the logits; None: H ** -0.5.
        implementation: see `pallas_kernels.moda_attention`.
        with_lse: the result is a pair, with the log-sum-exp [B, T, N] float32.
        causal: a token sees the sequence up to itself; False: all of it.
    """

    reads_slots: bool
    segment_ids: Callable[..., Array | None] = no_segments
    scale: float | None = None
    implementation: str | None = None
    with_lse: bool = False
    causal: bool = True
    window: int | None = None
    chunk: int = 1

    def __call__(self, request: tuple, stream: Stream, shared: tuple) -> PyTree:
        if self.with_lse or isinstance(stream, RoundedDepthStream):
            return with_own_backward(self, request, stream, shared)
        return attend(self.call(request, stream, shared), implementation=self.implementation)

    def forward(self, request: tuple, stream: Stream, shared: tuple) -> tuple[PyTree, Array | None]:
        """The output, and the log-sum-exp [B, T, N] float32, which may be part of the result."""
        part = attention_forward(self.call(request, stream, shared), implementation=self.implementation)
        return ((part.out, part.lse), None) if self.with_lse else (part.out, part.lse)

    def backward(
        self,
        request: tuple,
        result: PyTree,
        saved: Array | None,
        stream: Stream,
        shared: tuple,
        dresult: PyTree,
        dbuffers: tuple[Array, ...],
    ) -> tuple[tuple, tuple[Array, ...]]:
        """As `Operation.backward`; the kernels add to the buffers in place."""
        return self.backward_deferred(request, result, saved, stream, shared, dresult, dbuffers, None)[:2]

    def backward_deferred(
        self,
        request: tuple,
        result: PyTree,
        saved: Array | None,
        stream: Stream,
        shared: tuple,
        dresult: PyTree,
        dbuffers: tuple[Array, ...] | None,
        first: Array | None,
    ) -> tuple[tuple, tuple[Array, ...], tuple[Array, Upstream] | None]:
        """As `Operation.backward_deferred`; the query, and what of the softmax its gradients need, are what waits."""
        dlse = None
        if self.with_lse:
            (result, saved), (dresult, dlse) = result, dresult
        # From the rounded output. The op by itself (`__call__`) adds what rounding took from it, which here would be
        # one more array of the output's size for every layer. It matters in the op's own gradients where a softmax is
        # peaked over few tokens: ten times the error at T <= 3. In a model's bfloat16 gradients it does not show: a
        # relative error of 1.07e-2 both ways at T = 1024, within 3 % of each other with sharpened queries too.
        upstream = Upstream(dresult, saved, delta(dresult, Part(result, saved), dlse))
        call = self.call(request, stream, shared)
        if call.depth is None or (first is not None and dispatch.gradient_group(self.implementation, call) is None):
            first = None  # nothing to defer, or kernels that do not
        elif not self._in_groups(call):
            first = None
        elif first is not None:
            call = dataclasses.replace(call, depth=dataclasses.replace(call.depth, deferred=first))
        dquery, dkey, dvalue, *sums = attention_backward(
            call, upstream, buffers=None if call.depth is None else dbuffers, implementation=self.implementation
        )
        dbuffers = dbuffers if call.depth is None else tuple(sums)
        return (dquery, dkey, dvalue), dbuffers, None if first is None else (call.query, upstream)

    def gradients(
        self,
        request: tuple,
        result: PyTree,
        saved: Array | None,
        stream: Stream,
        shared: tuple,
        dresult: PyTree,
    ) -> tuple[tuple, tuple[Array, ...]]:
        """As `Operation.gradients`; the kernels write them all, also where they are 0."""
        if not (self.reads_slots and stream.slots):
            return super().gradients(request, result, saved, stream, shared, dresult)
        return self.backward(request, result, saved, stream, shared, dresult, None)

    def add_deferred(
        self, waiting: list[tuple[Array, Upstream]], stream: Stream, dbuffers: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        """As `Operation.add_deferred`: one backward, the layers' query heads side by side at their KV heads."""
        batch, tokens, _, num_kv_heads, head_dim = stream.key.shape

        def side_by_side(*arrays: Array) -> Array:
            grouped = [x.reshape(batch, tokens, num_kv_heads, -1, *x.shape[3:]) for x in arrays]  # [B, T, K, G, ...]
            return jnp.concatenate(grouped, axis=3).reshape(batch, tokens, -1, *arrays[0].shape[3:])

        query, upstream = jax.tree.map(side_by_side, *waiting)
        slots = DepthKV(stream.key, stream.value, length=filled_slots(stream))
        call = Call(query, depth=slots, scale=self._scale(head_dim), query_gradient=False)
        gradients = attention_backward(call, upstream, buffers=dbuffers, implementation=self.implementation)
        return gradients.depth_key, gradients.depth_value

    def gradient_group(self, request: tuple, stream: Stream, shared: tuple) -> int:
        """As `Operation.gradient_group`: what the kernels of the call gain by."""
        call = self.call(request, stream, shared)
        if call.depth is None or not self._in_groups(call):
            return 1
        return dispatch.gradient_group(self.implementation, call) or 1

    @staticmethod
    def _in_groups(call: Call) -> bool:
        """Whether `add_deferred` serves it: the layers of a group see the same slots, each query those of its token."""
        return call.depth.start is None and call.depth.chunk == 1

    def call(self, request: tuple, stream: Stream, shared: tuple) -> Call:
        """The op's operands: no depth part without slots, which is plain attention."""
        query, key, value = request
        depth = None
        if self.reads_slots and stream.slots:
            depth = self.slots(stream)
        mask = dataclasses.replace(causal_mask(self.segment_ids(*shared)), causal=self.causal)
        return Call(query, key, value, mask, depth, self._scale(query.shape[-1]))

    def slots(self, stream: Stream, own: int = 0) -> DepthKV:
        """What is seen of a `DepthStream`, whose last `own` entries count beside the window."""
        filled = filled_slots(stream)
        if self.window is None or self.window + own >= stream.slots:
            return DepthKV(stream.key, stream.value, length=filled, chunk=self.chunk)
        start = jnp.maximum(jnp.asarray(filled, jnp.int32) - (self.window + own), 0)
        return DepthKV(stream.key, stream.value, start=start, length=filled, chunk=self.chunk)

    def _scale(self, head_dim: int) -> float:
        return head_dim**-0.5 if self.scale is None else self.scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_own_backward(operation: Operation, request: tuple, stream: Stream, shared: tuple) -> PyTree:
    """An operation's result outside of the layer loop, with its own backward; `shared` gets no gradient."""
    return operation.forward(request, stream, shared)[0]


def _own_forward(operation: Operation, request: tuple, stream: Stream, shared: tuple) -> tuple[PyTree, tuple]:
    result, saved = operation.forward(request, stream, shared)
    return result, (request, result, saved, stream, shared)


def _own_backward(operation: Operation, residuals: tuple, dresult: PyTree) -> tuple:
    request, result, saved, stream, shared = residuals
    drequest, dbuffers = operation.gradients(request, result, saved, stream.bare(), shared, dresult)
    return drequest, stream.cotangent(dbuffers), None


with_own_backward.defvjp(_own_forward, _own_backward)
