"""Depth attention: a sub-layer reads by attention over the depth KV of all earlier ones, with its predecessor's query.

Sub-layers j = 1..2L, each a function F_j with its own norm inside; entry 0 is the embedding's:

    X_in = sum_{i < j} softmax_i( Q_{j-1} . K_i / sqrt(H) ) V_i,    X_out = F_j(X_in)
    Q_j, K_j, V_j = linear maps of X_out

at every token by itself and for every head; the heads' results together are X_in. There is no residual stream and no
projection behind the read. The head reads once more, with Q_2L. The source does not say what starts it, what the head
reads, or how Q, K and V are normed; here they are not, and the embedding has maps of its own, but no query: the first
read has one entry, whatever it asks.

Source: arXiv 2603.15619, figure 3c. Axes: B batch, T tokens, N query heads, K key/value heads, H head_dim, D = N x H.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config_checks import require
from moda_jax.model.depth.mechanism import ATTENTION, FFN, OUTPUT, DepthMechanism, SubLayer
from moda_jax.model.depth.operations import Operation
from moda_jax.model.depth.reads import DepthAttention
from moda_jax.model.depth.stream import DepthStream, Entry, Stream
from moda_jax.model.initial_keys import InitialKeys
from moda_jax.model.layers import Projection
from moda_jax.numerics.precision import compute_dtype
from moda_jax.parallel.mesh import constrain

if TYPE_CHECKING:
    from moda_jax.config import TransformerConfig

Array = jax.Array


class Maps(nnx.Module):
    """From an output [B, T, D] to what it is read by: its key and value, and the query for the next read.

    Args:
        config: of the model.
        asks: False: no query.
        rngs: source of the maps.
    """

    def __init__(self, config: TransformerConfig, *, asks: bool, rngs: InitialKeys) -> None:
        def projection(name: str, spec: str, *shape: int) -> Projection:
            return Projection(
                spec, (config.width, *shape), initializer_range=config.initializer_range,
                dtype=compute_dtype(config.dtype), rngs=rngs.at(name),
            )  # fmt: skip

        self.depth_query = (
            projection("depth_query", "btd,dnh->btnh", config.num_heads, config.head_dim) if asks else None
        )
        self.depth_kv = projection("depth_kv", "btd,dckh->btckh", 2, config.num_kv_heads, config.head_dim)

    def entry(self, output: Array) -> Entry:
        """Key and value [B, T, K, H]."""
        pair = self.depth_kv(output)  # [B, T, 2, K, H]
        return Entry((pair[:, :, 0], pair[:, :, 1]))

    def query(self, output: Array) -> Array:
        """[B, T, N, H]."""
        return constrain(self.depth_query(output), "batch", "tokens", "heads", "head_dim")


class AttentionOverDepth(DepthMechanism):
    """The carry is the query of the sub-layer before, [B, T, N, H]; the stream holds the keys and values of all.

    Args:
        config: of the model.
        last: also holds the embedding's maps.
        rngs: source of the maps.
    """

    stream_type: ClassVar[type[Stream]] = DepthStream
    tensors: ClassVar[dict[str, tuple[str, int]]] = {
        f"{place}.{name}.kernel": (f"{place}.{name}_proj.weight", 1)
        for place in ("embedding_maps", "attention_maps", "ffn_maps")
        for name in ("depth_query", "depth_kv")
    }

    def __init__(self, config: TransformerConfig, *, last: bool, rngs: InitialKeys) -> None:
        self.embedding_maps = Maps(config, asks=False, rngs=rngs.at("embedding_maps")) if last else None
        self.attention_maps = Maps(config, asks=True, rngs=rngs.at("attention_maps"))
        self.ffn_maps = Maps(config, asks=True, rngs=rngs.at("ffn_maps"))
        self.last = last

    @classmethod
    def check(cls, config: TransformerConfig) -> None:
        super().check(config)
        require(
            config.stochastic_depth == 0, "model.stochastic_depth", config.stochastic_depth,
            "0 with model.depth='depth_attention', where no residual stream goes around a sub-layer",
        )  # fmt: skip
        require(
            config.num_heads * config.head_dim == config.width, "model.width", config.width,
            f"model.num_heads * model.head_dim = {config.num_heads * config.head_dim} with model.depth="
            "'depth_attention': the heads' results together are a sub-layer's input",
        )  # fmt: skip

    @classmethod
    def build(cls, config: TransformerConfig, *, last: bool, rngs: InitialKeys) -> AttentionOverDepth:
        return cls(config, last=last, rngs=rngs)

    @classmethod
    def slots(cls, config: TransformerConfig) -> int:
        return 1 + 2 * config.num_layers

    @classmethod
    def parameters(cls, config: TransformerConfig) -> int:
        """D^2 + 2 D^2 / G for every sub-layer; the embedding has no query."""
        entries = cls.slots(config) * 2 * config.num_kv_heads
        return config.width * config.head_dim * (entries + 2 * config.num_layers * config.num_heads)

    @classmethod
    def matrix_parameters(cls, config: TransformerConfig) -> int:
        return cls.parameters(config)

    @classmethod
    def read_flops(cls, config: TransformerConfig) -> int:
        """Two products of 2 N H FLOPs a slot."""
        return 4 * config.num_heads * config.head_dim * cls.slots_read(config)

    @classmethod
    def slots_read(cls, config: TransformerConfig) -> int:
        """The head's read meets all, each before it one less."""
        slots = cls.slots(config)
        return slots * (slots + 1) // 2

    @classmethod
    def operations(cls, config: TransformerConfig) -> dict[str, Operation]:
        return dict.fromkeys((ATTENTION, FFN, OUTPUT), DepthAttention(config.attention_implementation))

    def begin(self, config: TransformerConfig, x: Array, spare: int = 0) -> tuple[Array, DepthStream]:
        empty = DepthStream.like(x, self.slots(config), config.num_kv_heads, config.head_dim).constrained()
        nothing = jnp.zeros_like(x).reshape(*x.shape[:2], config.num_heads, config.head_dim)
        nothing = constrain(nothing, "batch", "tokens", "heads", "head_dim")
        return nothing, empty.write(DepthStream.constrained_entry(self.embedding_maps.entry(x)))

    def request(self, site: str, carry: Array, layer: None) -> Array:
        return carry

    def input(self, site: str, carry: Array, result: tuple[Array, Array], layer: None) -> tuple[Array, None]:
        return _together(result), None

    def residual(self, site: str, carry: Array, context: None, output: Array, layer: None) -> Array:
        """The query that the output writes for the next read."""
        return self._maps(site).query(output)

    def entries(self, sublayer: SubLayer) -> tuple[Entry, ...]:
        """The output's key and value."""
        return (self._maps(sublayer.site).entry(sublayer.output),)

    def finish(self, carry: Array, result: tuple[Array, Array]) -> Array:
        return _together(result)

    def _maps(self, site: str) -> Maps:
        return self.attention_maps if site == ATTENTION else self.ffn_maps


def _together(result: tuple[Array, Array]) -> Array:
    """The heads' results as one [B, T, D]."""
    read, _ = result
    return constrain(read.reshape(*read.shape[:2], -1), "batch", "tokens", "channels")
