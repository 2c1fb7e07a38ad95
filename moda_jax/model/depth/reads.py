"""Reads of a stream outside of attention's softmax: sums over the filled slots of each token.

Every read is one pass over the slots forward and one or two backward, has its own backward that adds to the gradient
buffer, and keeps nothing of the stream's size. Written in plain JAX: XLA fuses the products into the sums, so that
nothing of [B, T, S, D] stands in memory but the stream and its gradient.

Axes: B batch, T tokens, S slots, D model width, K key/value heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.model.depth.operations import Operation, filled_slots, with_own_backward
from moda_jax.model.depth.stream import DepthStream, Entry, Stream, empty_slots
from moda_jax.parallel.attention import attention_backward, attention_forward
from pallas_kernels.operands import Call, DepthKV, Upstream
from pallas_kernels.parts import Part, delta

Array = jax.Array

MASKED = -1e30  # a masked logit: exp(MASKED - any real logit) is exactly 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HiddenStream(Stream):
    """Hidden states.

    Attributes:
        hidden: [B, T, S, D].
        length: int32 scalar, filled slots, see `Stream`.
    """

    axes: ClassVar[tuple[tuple[str, ...], ...]] = (("channels",),)

    hidden: Array
    length: Array | np.int32

    @classmethod
    def starting_with(cls, x: Array, slots: int) -> HiddenStream:
        """A stream of `slots` slots for x's tokens, whose first entry is x [B, T, D]."""
        return cls(empty_slots(x, slots, x.shape[2:]), np.int32(0)).constrained().write(Entry((x,)))


class Read(Operation):
    """An operation whose backward is its own outside of the layer loop too."""

    def __call__(self, request: tuple, stream: Stream, shared: tuple) -> tuple:
        del shared  # a read is of the stream alone
        return with_own_backward(self, request, stream, ())


@dataclasses.dataclass(frozen=True)
class SoftmaxMixture(Read):
    """A mixture of hidden states, weighted by how they look in one direction:

        logit_s = direction . v_s / sqrt(mean(v_s^2) + epsilon),    mixture = sum_s softmax(logit)_s v_s

    Request: (direction [D] float32). Result: the mixture [B, T, D] in the stream's dtype, and the logits' log-sum-exp
    [B, T] float32, by which another source can be mixed in (`joined`). No filled slot: 0 and -inf.

    Attributes:
        epsilon: added to the mean square.
    """

    epsilon: float = 1e-6

    def forward(self, request: tuple, stream: HiddenStream, shared: tuple) -> tuple[tuple[Array, Array], None]:
        """As the class says, in float32."""
        (direction,) = request
        logits, _, _ = self._logits(direction, stream)
        top = jnp.max(logits, axis=-1)  # [B, T]
        weights = jnp.exp(logits - top[..., None])
        total = jnp.sum(jnp.where(logits > MASKED, weights, 0.0), axis=-1)
        lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
        mixture = _weighted_sum(_weights(logits, lse), stream)
        return (mixture.astype(stream.hidden.dtype), lse), None

    def backward(self, request, result, saved, stream, shared, dresult, dbuffers):
        """dv_s = a_s dmix + dlogit_s (r_s direction - logit_s r_s^2 / D v_s), dlogit_s = a_s (dmix . v_s - delta)."""
        (direction,), (_, lse), (dmixture, dlse), (dhidden,) = request, result, dresult, dbuffers
        logits, inverse, hidden = self._logits(direction, stream)
        weights = _weights(logits, lse)  # [B, T, S]
        dmixture = dmixture.astype(jnp.float32)
        along = jnp.sum(dmixture[:, :, None] * hidden, axis=-1)  # [B, T, S]
        # From the products themselves, not from the rounded mixture.
        delta = jnp.sum(weights * along, axis=-1) - dlse
        dlogits = weights * (along - delta[..., None])
        slope = dlogits * inverse
        ddirection = jnp.sum(slope[..., None] * hidden, axis=(0, 1, 2))
        curvature = dlogits * logits * inverse**2 / hidden.shape[-1]
        added = (
            weights[..., None] * dmixture[:, :, None]
            + slope[..., None] * along_last(direction, hidden)
            - jnp.where(weights > 0, curvature, 0.0)[..., None] * hidden
        )
        return (ddirection.astype(direction.dtype),), (_added(dhidden, added),)

    def _logits(self, direction: Array, stream: HiddenStream) -> tuple[Array, Array, Array]:
        """Logits and inverse root mean squares [B, T, S], and the slots [B, T, S, D], zero where not filled."""
        hidden = _filled(stream.hidden, stream.length)
        logits, inverse = mixture_logit(direction, hidden, self.epsilon)
        return jnp.where(_is_filled(stream.slots, stream.length), logits, MASKED), inverse, hidden


def along_last(vector: Array, like: Array) -> Array:
    """`vector` [D] as float32 beside `like` [..., D]: of its rank, so that strict rank promotion has nothing to say."""
    return vector.astype(jnp.float32).reshape((1,) * (like.ndim - 1) + vector.shape)


def mixture_logit(direction: Array, hidden: Array, epsilon: float) -> tuple[Array, Array]:
    """`SoftmaxMixture`'s logits of hidden states [..., D], and their inverse root mean squares, [...] float32."""
    hidden = hidden.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(hidden * hidden, axis=-1) + epsilon)
    return jnp.sum(hidden * along_last(direction, hidden), axis=-1) * inverse, inverse


def joined(result: tuple[Array, Array], logit: Array, source: Array) -> Array:
    """The mixture over a read's slots and one more source.

    Args:
        result: a read's mixture [..., D] and log-sum-exp [...].
        logit: the source's, [...] float32; MASKED: it does not count.
        source: [..., D].

    Returns:
        [..., D] in the source's dtype.
    """
    mixture, lse = result
    # One of the two is always finite. Where both logits are -inf nothing was asked.
    weight = jax.nn.sigmoid(logit - lse)[..., None]
    return ((1.0 - weight) * mixture.astype(jnp.float32) + weight * source.astype(jnp.float32)).astype(source.dtype)


@dataclasses.dataclass(frozen=True)
class WeightedSum(Read):
    """Hidden states times given weights: sum_s weight_s v_s over the filled slots.

    Request: (weights [S'] float32), the same for every token; slots beyond S' do not count. Result: [B, T, D] in the
    stream's dtype.
    """

    def forward(self, request: tuple, stream: HiddenStream, shared: tuple) -> tuple[Array, None]:
        """As the class says, in float32."""
        weights = self._fitted(request[0], stream)
        return _weighted_sum(weights[None, None], stream).astype(stream.hidden.dtype), None

    def backward(self, request, result, saved, stream, shared, dresult, dbuffers):
        """dv_s = weight_s dresult, dweight_s = sum over all tokens of dresult . v_s."""
        (weights,), (dhidden,) = request, dbuffers
        dresult = dresult.astype(jnp.float32)[:, :, None]  # [B, T, 1, D]
        hidden = _filled(stream.hidden, stream.length)
        dweights = jnp.sum(dresult * hidden, axis=(0, 1, 3))[: len(weights)]  # [S]
        dweights = jnp.pad(dweights, (0, len(weights) - len(dweights))).astype(weights.dtype)
        added = self._fitted(weights, stream)[None, None, :, None] * dresult
        return (dweights,), (_added(dhidden, added),)

    def _fitted(self, weights: Array, stream: HiddenStream) -> Array:
        """[S] float32: 0 in slots that are not filled or have no weight."""
        weights = weights[: stream.slots].astype(jnp.float32)
        weights = jnp.pad(weights, (0, stream.slots - len(weights)))
        return jnp.where(_is_filled(stream.slots, stream.length)[0, 0], weights, 0.0)


@dataclasses.dataclass(frozen=True)
class WeightedSums(Read):
    """C sums of hidden states, with weights of each token's own: sum_s weight_cs v_s over the filled slots.

    Request: (weights [B, T, C, S] float32). Result: [B, T, C, D] in the stream's dtype.
    """

    def forward(self, request: tuple, stream: HiddenStream, shared: tuple) -> tuple[Array, None]:
        """As the class says, in float32."""
        (weights,) = request
        filled = jnp.where(_is_filled(stream.slots, stream.length)[:, :, None], weights, 0.0)
        sums = [_weighted_sum(filled[:, :, c], stream) for c in range(weights.shape[2])]
        return jnp.stack(sums, axis=2).astype(stream.hidden.dtype), None

    def backward(self, request, result, saved, stream, shared, dresult, dbuffers):
        """dv_s = sum_c weight_cs dresult_c, dweight_cs = dresult_c . v_s."""
        (weights,), (dhidden,) = request, dbuffers
        dresult = dresult.astype(jnp.float32)
        hidden = _filled(stream.hidden, stream.length)
        filled = jnp.where(_is_filled(stream.slots, stream.length)[:, :, None], weights, 0.0)
        sums = range(weights.shape[2])
        dweights = jnp.stack([jnp.sum(dresult[:, :, c, None] * hidden, axis=-1) for c in sums], axis=2)
        added = sum(filled[:, :, c, :, None] * dresult[:, :, c, None] for c in sums)
        return (dweights.astype(weights.dtype),), (_added(dhidden, added),)


@dataclasses.dataclass(frozen=True)
class DepthAttention(Read):
    """Attention over the filled slots of each token, `pallas_kernels.depth_attention`.

    Request: (query [B, T, N, H]). Result: [B, T, N, H] in its dtype, and the log-sum-exp [B, T, N] float32.

    Attributes:
        implementation: see `pallas_kernels.depth_attention`.
    """

    implementation: str | None = None

    def forward(self, request: tuple, stream: DepthStream, shared: tuple) -> tuple[tuple[Array, Array], None]:
        """The output and its log-sum-exp."""
        (query,) = request
        if stream.slots == 0:
            return (jnp.zeros_like(query), jnp.full(query.shape[:-1], -jnp.inf, jnp.float32)), None
        part = attention_forward(self._call(query, stream), implementation=self.implementation)
        return (part.out, part.lse), None

    def backward(self, request, result, saved, stream, shared, dresult, dbuffers):
        """As `Operation.backward`; the kernels add to the buffers in place."""
        (query,), (out, lse), (dout, dlse) = request, result, dresult
        if stream.slots == 0:
            return (jnp.zeros_like(query),), dbuffers
        upstream = Upstream(dout, lse, delta(dout, Part(out, lse), dlse))
        gradients = attention_backward(
            self._call(query, stream), upstream, buffers=dbuffers, implementation=self.implementation
        )
        return (gradients.query,), (gradients.depth_key, gradients.depth_value)

    def _call(self, query: Array, stream: DepthStream) -> Call:
        depth = DepthKV(stream.key, stream.value, length=filled_slots(stream))
        return Call(query, depth=depth, scale=query.shape[-1] ** -0.5)


def _filled(hidden: Array, length: Array | np.int32) -> Array:
    """[B, T, S, D] float32, zero in slots that are not filled, which may hold anything."""
    return jnp.where(_is_filled(hidden.shape[2], length)[..., None], hidden, 0).astype(jnp.float32)


def _is_filled(slots: int, length: Array | np.int32) -> Array:
    """[1, 1, S], beside [B, T, S]."""
    return (jnp.arange(slots, dtype=jnp.int32) < length)[None, None]


def _weights(logits: Array, lse: Array) -> Array:
    """softmax(logits) from their log-sum-exp; 0 where nothing is filled."""
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])
    return jnp.where(logits > MASKED, weights, 0.0)


def _weighted_sum(weights: Array, stream: HiddenStream) -> Array:
    """Sum over the slots, [B, T, D] float32. weights: [B, T, S], or [1, 1, S] where they are the same for all."""
    return jnp.sum(weights[..., None] * _filled(stream.hidden, stream.length), axis=2)


def _added(buffer: Array, more: Array) -> Array:
    """`buffer` plus `more` float32, in the buffer's dtype."""
    return (buffer.astype(jnp.float32) + more).astype(buffer.dtype)
