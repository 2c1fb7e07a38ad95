"""What mechanisms of n residual streams have in common: X [n, D] in the residual stream's place.

Per sub-layer, with weights that every token makes for itself:

    X' = mix X + outer(write, F(norm(read . X))),    mix [n, n], read and write [n]

Start: n copies of the embedding; end: their sum. Axes: B batch, T tokens, n streams, D model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from moda_jax.model.depth.mechanism import DepthMechanism
from moda_jax.parallel.mesh import constrain

if TYPE_CHECKING:
    from moda_jax.config import TransformerConfig

Array = jax.Array

EPSILON = 1e-6  # of the norm that the weights are made from
GATE = 0.01  # of a token's own part of the weights, at the start
CONTEXT = tuple[Array, Array]


class ResidualStreams(DepthMechanism):
    """The carry is X [B, T, n, D]; there is no stream of slots."""

    has_context: ClassVar[bool] = True

    @classmethod
    def streams(cls, config: TransformerConfig) -> int:
        """n."""
        raise NotImplementedError(f"{cls.__name__}.streams: the number of residual streams")

    @classmethod
    def read_flops(cls, config: TransformerConfig) -> int:
        """The sub-layer's input, the mixed streams and the output's share of them: n (n + 2) products of D."""
        n = cls.streams(config)
        return 2 * config.num_layers * 2 * config.width * n * (n + 2)

    def weights(self, site: str, carry: Array, layer: Array | int | None) -> tuple[Array, Array, Array]:
        """read and write [B, T, n] and mix [B, T, n (to), n (from)] of a sub-layer, float32."""
        raise NotImplementedError(f"{type(self).__name__}.weights: how the streams are mixed")

    def begin(self, config: TransformerConfig, x: Array, spare: int = 0):
        copies = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], self.streams(config), x.shape[2]))
        return _laid_out(copies), self.stream_type()

    def input(self, site: str, carry: Array, result: None, layer: Array | int | None) -> tuple[Array, CONTEXT]:
        read, write, mix = self.weights(site, carry, layer)
        x = jnp.sum(read[..., None] * carry.astype(jnp.float32), axis=2).astype(carry.dtype)
        return constrain(x, "batch", "tokens", "channels"), (write, mix)

    def residual(self, site: str, carry: Array, context: CONTEXT, output: Array, layer: Array | int | None) -> Array:
        write, mix = context
        wide = carry.astype(jnp.float32)
        mixed = jnp.sum(mix[..., None] * wide[:, :, None], axis=3)  # [B, T, n, D]
        added = write[..., None] * output.astype(jnp.float32)[:, :, None]
        return _laid_out((mixed + added).astype(carry.dtype))

    def finish(self, carry: Array, result: None) -> Array:
        return jnp.sum(carry.astype(jnp.float32), axis=2).astype(carry.dtype)


def _laid_out(x: Array) -> Array:
    return constrain(x, "batch", "tokens", None, "channels")
