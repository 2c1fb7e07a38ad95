"""Reads of a stream outside of attention's softmax: sums over the filled slots of each token.

Every read has its own backward, that adds to the gradient buffer, and keeps nothing of the stream's size: nothing of
[B, T, S, D] stands in memory but the stream and its gradient. Attention, the softmax mixture and sums with a
token's own weights have kernels on GPUs; the sum with the same weights for all is plain JAX, whose products XLA fuses
into it.

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
from moda_jax.parallel.hidden_slots import (
    softmax_mixture,
    softmax_mixture_backward,
    weighted_sums,
    weighted_sums_backward,
)
from pallas_kernels.hidden_slots import added, filled, is_filled
from pallas_kernels.operands import Call, DepthKV, Upstream
from pallas_kernels.parts import Part, delta

Array = jax.Array


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
    """A mixture of hidden states, weighted by how they look in one direction: `pallas_kernels.mixture`.

        logit_s = direction . v_s / sqrt(mean(v_s^2) + epsilon),    mixture = sum_s softmax(logit)_s v_s

    Request: (direction [D] float32). Result: the mixture [B, T, D] in the stream's dtype, and the logits' log-sum-exp
    [B, T] float32, by which another source can be mixed in (`joined`). No filled slot: 0 and -inf.

    Attributes:
        epsilon: added to the mean square.
        implementation: see `pallas_kernels.mixture.softmax_mixture`.
    """

    epsilon: float = 1e-6
    implementation: str | None = None

    def forward(self, request: tuple, stream: HiddenStream, shared: tuple) -> tuple[tuple[Array, Array], None]:
        """As the class says, in float32."""
        return softmax_mixture(stream.hidden, *request, stream.length, **self._options()), None

    def backward(self, request, result, saved, stream, shared, dresult, dbuffers):
        """As `Operation.backward`; the kernel adds to the buffer in place."""
        (direction,), (dhidden,) = request, dbuffers
        ddirection, dhidden = softmax_mixture_backward(
            stream.hidden, direction, stream.length, result, dresult, dhidden, **self._options()
        )
        return (ddirection.astype(direction.dtype),), (dhidden,)

    def _options(self) -> dict:
        return {"epsilon": self.epsilon, "implementation": self.implementation}


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
        hidden = filled(stream.hidden, stream.length)
        dweights = jnp.sum(dresult * hidden, axis=(0, 1, 3))[: len(weights)]  # [S]
        dweights = jnp.pad(dweights, (0, len(weights) - len(dweights))).astype(weights.dtype)
        more = self._fitted(weights, stream)[None, None, :, None] * dresult
        return (dweights,), (added(dhidden, more),)

    def _fitted(self, weights: Array, stream: HiddenStream) -> Array:
        """[S] float32: 0 in slots that are not filled or have no weight."""
        weights = weights[: stream.slots].astype(jnp.float32)
        weights = jnp.pad(weights, (0, stream.slots - len(weights)))
        return jnp.where(is_filled(stream.slots, stream.length)[0, 0], weights, 0.0)


@dataclasses.dataclass(frozen=True)
class WeightedSums(Read):
    """C sums of hidden states, with weights of each token's own: `pallas_kernels.weighted_sums`.

    Request: (weights [B, T, C, S] float32). Result: [B, T, C, D] in the stream's dtype.

    Attributes:
        implementation: see `pallas_kernels.weighted_sums.weighted_sums`.
    """

    implementation: str | None = None

    def forward(self, request: tuple, stream: HiddenStream, shared: tuple) -> tuple[Array, None]:
        """As the class says, in float32."""
        return weighted_sums(stream.hidden, *request, stream.length, implementation=self.implementation), None

    def backward(self, request, result, saved, stream, shared, dresult, dbuffers):
        """As `Operation.backward`; the kernel adds to the buffer in place."""
        (weights,), (dhidden,) = request, dbuffers
        dweights, dhidden = weighted_sums_backward(
            stream.hidden, weights, stream.length, dresult, dhidden, implementation=self.implementation
        )
        return (dweights.astype(weights.dtype),), (dhidden,)


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


def _weighted_sum(weights: Array, stream: HiddenStream) -> Array:
    """Sum over the slots, [B, T, D] float32. weights: [B, T, S], or [1, 1, S] where they are the same for all."""
    return jnp.sum(weights[..., None] * filled(stream.hidden, stream.length), axis=2)
