"""Attention over some of the slots: what a layer reads of a `DepthStream` is a policy, chosen for a whole layer.

Of n filled slots, with at most R of them read:

    all      every one
    window   the last R
    hybrid   the first `first`, and the last R - first
    top      the R with the highest scores, a number per layer and slot that is learned: a value counts
             2 sigmoid(score) times, so that a score has a gradient while its slot is read. All start alike; the newer
             of two alike comes first, and a slot whose score falls below 0 makes room for one that was never read.

A policy lowers the bytes that are read, and not the stream: its slots are kept for the layers that read them.

Axes: B batch, T tokens, S slots, R slots read, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moda_jax.model.depth.operations import filled_slots
from moda_jax.model.depth.reads import Read
from moda_jax.model.depth.stream import DepthStream
from moda_jax.parallel.attention import attention_backward, attention_forward
from pallas_kernels.operands import Call, DepthKV, Upstream
from pallas_kernels.parts import Part, delta

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SlotAttention(Read):
    """Attention over the chosen slots of each token. Where `kinds` is 2, over every other slot by itself, twice.

    Request: (query [B, T, N, H], scores [S] float32; without "top" None). Result: for each kind the output [B, T, N, H]
    in the query's dtype, and the log-sum-exp [B, T, N] float32; 0 and -inf where nothing is filled.

    Attributes:
        read: "all", "window", "hybrid" or "top".
        slots: R; None: all.
        first: of "hybrid".
        kinds: kinds of entries, in turn; more than 1 with "all" alone.
        implementation: see `pallas_kernels.depth_attention`.
    """

    read: str = "all"
    slots: int | None = None
    first: int = 0
    kinds: int = 1
    implementation: str | None = None

    def forward(self, request: tuple, stream: DepthStream, shared: tuple) -> tuple[tuple, None]:
        """Outputs and log-sum-exps."""
        ((query, scores),) = request
        if stream.slots == 0:
            nothing = jnp.zeros_like(query), jnp.full(query.shape[:-1], -jnp.inf, jnp.float32)
            return (nothing,) * self.kinds, None
        results = []
        for place, window in self._places(scores, stream):
            key, value = self._cut(stream.key, place), self._weighed(self._cut(stream.value, place), scores, place)
            part = attention_forward(_call(query, key, value, window), implementation=self.implementation)
            results.append((part.out, part.lse))
        return tuple(results), None

    def backward(self, request, result, saved, stream, shared, dresult, dbuffers):
        """As `Operation.backward`, in what was chosen of the buffers."""
        ((query, scores),) = request
        dquery = jnp.zeros_like(query, dtype=jnp.float32)
        dscores = None if scores is None else jnp.zeros_like(scores)
        if stream.slots == 0:
            return ((dquery.astype(query.dtype), dscores),), dbuffers
        dkeys, dvalues = dbuffers
        for (place, window), (out, lse), (dout, dlse) in zip(
            self._places(scores, stream), result, dresult, strict=True
        ):
            key, plain = self._cut(stream.key, place), self._cut(stream.value, place)
            value = self._weighed(plain, scores, place)
            whole = key is stream.key and value is stream.value
            buffers = dkeys, dvalues
            if not whole:
                buffers = jnp.zeros_like(key, dtype=dkeys.dtype), jnp.zeros_like(value, dtype=dvalues.dtype)
            gradients = attention_backward(
                _call(query, key, value, window), Upstream(dout, lse, delta(dout, Part(out, lse), dlse)),
                buffers=buffers, implementation=self.implementation,
            )  # fmt: skip
            dkey, dvalue = gradients.depth_key, gradients.depth_value
            dquery += gradients.query.astype(jnp.float32)
            if whole:  # the kernels have added to the buffers in place
                dkeys, dvalues = dkey, dvalue
                continue
            if scores is not None:
                filled = (jnp.arange(plain.shape[2], dtype=jnp.int32) < window[1])[None, None, :, None, None]
                products = jnp.where(filled, dvalue.astype(jnp.float32) * plain.astype(jnp.float32), 0.0)
                weight = jax.nn.sigmoid(scores[place])
                slope = 2.0 * weight * (1.0 - weight) * jnp.sum(products, axis=(0, 1, 3, 4))
                dscores = dscores.at[place].add(slope.astype(scores.dtype))
                dvalue = self._weighed(dvalue, scores, place)
            dkeys, dvalues = self._add(dkeys, dkey, place), self._add(dvalues, dvalue, place)
        return ((dquery.astype(query.dtype), dscores),), (dkeys, dvalues)

    def _places(self, scores: Array | None, stream: DepthStream) -> list[tuple[Any, tuple[Array | None, Array]]]:
        """For each kind where its slots are, and the window [start, length) of those that is read."""
        filled = jnp.asarray(filled_slots(stream), jnp.int32)
        if self.read == "all" or self.slots >= stream.slots:
            kinds = [(kind, (None, (filled + self.kinds - 1 - kind) // self.kinds)) for kind in range(self.kinds)]
            return kinds if self.read != "top" else [(jnp.arange(len(scores), dtype=jnp.int32), (None, filled))]
        if self.read == "window":
            return [(0, (jnp.maximum(filled - self.slots, 0), filled))]
        window = None, jnp.minimum(filled, self.slots)
        if self.read == "hybrid":
            return [(jnp.maximum(filled - (self.slots - self.first), self.first), window)]
        known = jnp.arange(len(scores), dtype=jnp.int32)
        ranked = jnp.where(known < filled, jax.lax.stop_gradient(scores), -jnp.inf)[::-1]
        return [((len(scores) - 1 - jax.lax.top_k(ranked, self.slots)[1]).astype(jnp.int32), window)]

    def _cut(self, buffer: Array, place: Any) -> Array:
        """What is read of a buffer [B, T, S, K, H]."""
        if (
            self.read == "top"
        ):  # slot by slot: XLA's gather, and still more its scatter, take many times the bytes' time
            return jnp.concatenate(
                [jax.lax.dynamic_slice_in_dim(buffer, place[i], 1, axis=2) for i in range(len(place))], axis=2
            )
        if isinstance(place, int):
            return buffer if self.kinds == 1 else buffer[:, :, place :: self.kinds]
        last = jax.lax.dynamic_slice_in_dim(buffer, place, self.slots - self.first, axis=2)
        return jnp.concatenate([buffer[:, :, : self.first], last], axis=2)

    def _add(self, buffer: Array, more: Array, place: Any) -> Array:
        """A gradient buffer with what was read of it grown by `more`."""
        if self.read == "top":
            for i in range(len(place)):  # no slot twice
                row = jax.lax.dynamic_slice_in_dim(buffer, place[i], 1, axis=2) + more[:, :, i : i + 1]
                buffer = jax.lax.dynamic_update_slice_in_dim(buffer, row, place[i], axis=2)
            return buffer
        if isinstance(place, int):
            return buffer.at[:, :, place :: self.kinds].add(more)
        size = self.slots - self.first
        last = jax.lax.dynamic_slice_in_dim(buffer, place, size, axis=2) + more[:, :, self.first :]
        buffer = buffer.at[:, :, : self.first].add(more[:, :, : self.first])
        return jax.lax.dynamic_update_slice_in_dim(buffer, last, place, axis=2)

    def _weighed(self, value: Array, scores: Array | None, place: Any) -> Array:
        """Values [B, T, R, K, H] as often as they count."""
        if scores is None:
            return value
        weight = 2.0 * jax.nn.sigmoid(scores[place])[None, None, :, None, None]
        return (value.astype(jnp.float32) * weight).astype(value.dtype)


def _call(query: Array, key: Array, value: Array, window: tuple[Array | None, Array]) -> Call:
    return Call(query, depth=DepthKV(key, value, *window), scale=query.shape[-1] ** -0.5)
