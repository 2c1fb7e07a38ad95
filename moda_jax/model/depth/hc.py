"""Hyper-connections: n residual streams, mixed by matrices that every token makes for itself.

Per sub-layer j, with streams X_s and u_s = X_s / rms(X_s), s, t = 1..n:

    [read_s | mix_s] = A_s + a tanh(u_s W) [1 + n],    write_s = B_s + b tanh(u_s w)
    X'_t = sum_s mix_st X_s + write_t F(norm(sum_s read_s X_s))

A starts as [e_{j mod n} | I], B as 1, W and w as 0, a and b as 0.01: all streams are the residual stream of a plain
pre-norm transformer. Start: n copies of the embedding; end: their sum, of which the final norm sees the direction. The
learned offset of A and B from where they start is the parameter.

Source: arXiv 2409.19606. Axes: B batch, T tokens, n streams, D model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config_checks import require
from moda_jax.model.depth.mechanism import ATTENTION, FFN
from moda_jax.model.depth.streams import EPSILON, GATE, ResidualStreams
from moda_jax.model.initial_keys import InitialKeys
from moda_jax.numerics.precision import compute_dtype, contract
from moda_jax.parameter import parameter

if TYPE_CHECKING:
    from moda_jax.config import TransformerConfig

Array = jax.Array


class HyperConnection(nnx.Module):
    """One sub-layer's W and w (`kernel` [D, n + 2], in the order read, mix, write), offset [n, n + 2] and gates [2].

    Args:
        streams, width: n, D.
        dtype: of the product u W.
    """

    def __init__(self, streams: int, width: int, *, dtype: jnp.dtype) -> None:
        self.dtype = dtype
        self.kernel = parameter(jnp.zeros((width, streams + 2), jnp.float32), "width", None, decays=True, is_cast=True)
        self.offset = parameter(jnp.zeros((streams, streams + 2), jnp.float32), None, None)
        self.gate = parameter(jnp.full((2,), GATE, jnp.float32), None)

    def __call__(self, x: Array, number: Array | int) -> tuple[Array, Array, Array]:
        """X [B, T, n, D] to read [B, T, n], mix [B, T, n, n] (from, to) and write [B, T, n], float32.

        Args:
            x: the streams.
            number: of the sub-layer, from 0.
        """
        n = x.shape[2]
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPSILON)  # [B, T, n, 1]
        products = contract("btnd,dm->btnm", x.astype(self.dtype), self.kernel[...].astype(self.dtype), jnp.float32)
        chosen = (jnp.arange(n, dtype=jnp.int32) == number % n).astype(jnp.float32)[:, None]
        start = jnp.concatenate([chosen, jnp.eye(n, dtype=jnp.float32), jnp.ones((n, 1), jnp.float32)], axis=1)
        gates = jnp.where(jnp.arange(n + 2, dtype=jnp.int32) <= n, self.gate[0], self.gate[1])
        weights = (start + self.offset[...])[None, None] + gates[None, None, None] * jnp.tanh(products * inverse)
        return weights[..., 0], weights[..., 1:-1], weights[..., -1]


class HyperConnections(ResidualStreams):
    """The carry is X [B, T, n, D]; there is no stream. Pre-norm only.

    Args:
        config: of the model.
    """

    numbered: ClassVar[bool] = True

    def __init__(self, config: TransformerConfig) -> None:
        n, dtype = config.hc.streams, compute_dtype(config.dtype)
        self.attention_hyper = HyperConnection(n, config.width, dtype=dtype)
        self.ffn_hyper = HyperConnection(n, config.width, dtype=dtype)

    @classmethod
    def check(cls, config: TransformerConfig) -> None:
        require(config.norm == "pre", "model.norm", config.norm, "'pre' with model.depth='hc'")

    @classmethod
    def build(cls, config: TransformerConfig, *, last: bool, rngs: InitialKeys) -> HyperConnections:
        del last, rngs
        return cls(config)

    @classmethod
    def streams(cls, config: TransformerConfig) -> int:
        return config.hc.streams

    @classmethod
    def parameters(cls, config: TransformerConfig) -> int:
        n = config.hc.streams
        return 2 * config.num_layers * ((config.width + n) * (n + 2) + 2)

    @classmethod
    def matrix_parameters(cls, config: TransformerConfig) -> int:
        """W meets every stream: n times as many products as it has elements."""
        n = config.hc.streams
        return 2 * config.num_layers * n * config.width * (n + 2)

    def weights(self, site: str, carry: Array, layer: Array | int) -> tuple[Array, Array, Array]:
        hyper = self.attention_hyper if site == ATTENTION else self.ffn_hyper
        read, mix, write = hyper(carry, 2 * layer + int(site == FFN))
        return read, write, jnp.swapaxes(mix, -1, -2)
