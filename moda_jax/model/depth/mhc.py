"""mHC: n residual streams, mixed by doubly stochastic matrices that every token makes for itself.

Per sub-layer, X [n, D], u = X / rms(vec X):

    pre = sigmoid(a_0 (u W_pre) + b_pre) [n],    post = 2 sigmoid(a_1 (u W_post) + b_post) [n]
    R = Sinkhorn(exp(a_2 (u W_res) + b_res)) [n, n]
    X' = R X + outer(post, F(norm(pre . X)))

Sinkhorn: rounds of columns, then rows, in float32. Start: n copies of the embedding; end: their sum. a = 0.01, b = 0,
W normal over its fan-in: all streams start alike and part through W.

Source: arXiv 2512.24880 (hyper-connections: 2409.19606). Axes: B batch, T tokens, n streams, D model width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config_checks import require
from moda_jax.model.depth.mechanism import ATTENTION
from moda_jax.model.depth.streams import EPSILON, GATE, ResidualStreams
from moda_jax.model.initial_keys import InitialKeys
from moda_jax.numerics.precision import compute_dtype, contract
from moda_jax.parameter import parameter

if TYPE_CHECKING:
    from moda_jax.config import TransformerConfig

Array = jax.Array


class Connection(nnx.Module):
    """What one sub-layer's matrices are made with: W [n, D, n^2 + 2 n] in the order pre, post, res; b; a.

    Args:
        streams, width: n, D.
        dtype: of the product u W.
        rngs: source of W.
    """

    def __init__(self, streams: int, width: int, *, dtype: jnp.dtype, rngs: InitialKeys) -> None:
        outputs = streams * streams + 2 * streams
        self.dtype = dtype
        init = nnx.initializers.normal(1.0 / math.sqrt(streams * width))
        self.kernel = parameter(
            init(rngs.params(), (streams, width, outputs), jnp.float32), None, "width", None, decays=True, is_cast=True
        )
        self.offset = parameter(jnp.zeros((outputs,), jnp.float32), None)
        self.gate = parameter(jnp.full((3,), GATE, jnp.float32), None)

    def __call__(self, x: Array, rounds: int) -> tuple[Array, Array, Array]:
        """X [B, T, n, D] to pre, post [B, T, n] and R [B, T, n, n], float32."""
        n = x.shape[2]
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=(2, 3)) + EPSILON)  # [B, T]
        products = contract("btnd,ndm->btm", x.astype(self.dtype), self.kernel[...].astype(self.dtype), jnp.float32)
        gates = jnp.repeat(self.gate[...], jnp.array([n, n, n * n]), total_repeat_length=n * n + 2 * n)
        logits = gates[None, None] * (products * inverse[..., None]) + self.offset[...][None, None]
        pre, post, mix = jnp.split(logits, [n, 2 * n], axis=-1)
        mix = mix.reshape(*mix.shape[:-1], n, n)
        return jax.nn.sigmoid(pre), 2.0 * jax.nn.sigmoid(post), jax.checkpoint(sinkhorn, static_argnums=1)(mix, rounds)


def sinkhorn(logits: Array, rounds: int) -> Array:
    """exp(logits) [..., n, n], columns and then rows divided by their sums, `rounds` times."""
    matrix = jnp.exp(logits - jnp.max(logits, axis=(-2, -1), keepdims=True))  # a common factor falls out

    def normalized(matrix: Array, _: None) -> tuple[Array, None]:
        matrix = matrix / jnp.sum(matrix, axis=-2, keepdims=True)
        return matrix / jnp.sum(matrix, axis=-1, keepdims=True), None

    return jax.lax.scan(normalized, matrix, None, length=rounds)[0]


class ManifoldHyperConnections(ResidualStreams):
    """The carry is X [B, T, n, D]; there is no stream. Pre-norm only.

    Args:
        config: of the model.
        rngs: source of the parameters.
    """

    def __init__(self, config: TransformerConfig, *, rngs: InitialKeys) -> None:
        n, width, dtype = config.mhc.streams, config.width, compute_dtype(config.dtype)
        self.rounds = config.mhc.sinkhorn_rounds
        self.attention_connection = Connection(n, width, dtype=dtype, rngs=rngs.at("attention_connection"))
        self.ffn_connection = Connection(n, width, dtype=dtype, rngs=rngs.at("ffn_connection"))

    @classmethod
    def check(cls, config: TransformerConfig) -> None:
        require(config.norm == "pre", "model.norm", config.norm, "'pre' with model.depth='mhc'")

    @classmethod
    def build(cls, config: TransformerConfig, *, last: bool, rngs: InitialKeys) -> ManifoldHyperConnections:
        del last
        return cls(config, rngs=rngs)

    @classmethod
    def parameters(cls, config: TransformerConfig) -> int:
        n = config.mhc.streams
        return cls.matrix_parameters(config) + 2 * config.num_layers * (n * n + 2 * n + 3)

    @classmethod
    def matrix_parameters(cls, config: TransformerConfig) -> int:
        n = config.mhc.streams
        return 2 * config.num_layers * n * config.width * (n * n + 2 * n)

    @classmethod
    def streams(cls, config: TransformerConfig) -> int:
        return config.mhc.streams

    def weights(self, site: str, carry: Array, layer: None) -> tuple[Array, Array, Array]:
        connection = self.attention_connection if site == ATTENTION else self.ffn_connection
        return connection(carry, self.rounds)
