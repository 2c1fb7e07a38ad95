"""Depth-attention value mixing: a layer's values become a mixture over layers, before attention.

Layer l, KV head g, with q = the mean of the head's queries, after norm and rotation, and the sources i < l with
i % stride == 0, and l itself:

    a = softmax_i( q . k_i / sqrt(H) ),    v^_l = sum_{i < l} a_i v^_i + a_l v_l

Then ordinary causal attention with k_l and v^_l. Earlier values are the mixed ones, which also stand in the KV cache.

Source: arXiv 2606.05014. Axes: B batch, T tokens, N query heads, K key/value heads, G = N / K, H head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from moda_jax.model.depth.mechanism import ATTENTION, VALUE, DepthMechanism, SubLayer
from moda_jax.model.depth.operations import Operation
from moda_jax.model.depth.reads import DepthAttention, joined
from moda_jax.model.depth.stream import DepthStream, Entry, Stream
from moda_jax.model.initial_keys import InitialKeys

if TYPE_CHECKING:
    from moda_jax.config import TransformerConfig

Array = jax.Array


class ValueMixing(DepthMechanism):
    """The stream holds keys and mixed values of every `stride`-th layer. No parameters.

    Args:
        stride: of the layers that are sources.
        last: the last layer is nobody's source.
    """

    stream_type: ClassVar[type[Stream]] = DepthStream
    numbered: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("pre", "post", "post_sum")

    def __init__(self, stride: int, *, last: bool) -> None:
        self.stride = stride
        self.last = last

    @classmethod
    def build(cls, config: TransformerConfig, *, last: bool, rngs: InitialKeys) -> ValueMixing:
        del rngs
        return cls(config.value_mixing.stride, last=last)

    @classmethod
    def slots(cls, config: TransformerConfig) -> int:
        return len(range(0, config.num_layers - 1, config.value_mixing.stride))

    @classmethod
    def read_flops(cls, config: TransformerConfig) -> int:
        """Two products of 2 K H FLOPs a source, the layer's own among them."""
        return 4 * config.num_kv_heads * config.head_dim * (cls.slots_read(config) + config.num_layers)

    @classmethod
    def slots_read(cls, config: TransformerConfig) -> int:
        return sum(len(range(0, layer, config.value_mixing.stride)) for layer in range(config.num_layers))

    @classmethod
    def operations(cls, config: TransformerConfig) -> dict[str, Operation]:
        return {VALUE: DepthAttention(config.attention_implementation)}

    def begin(self, config: TransformerConfig, x: Array, spare: int = 0) -> tuple[Array, DepthStream]:
        return x, DepthStream.like(x, self.slots(config), config.num_kv_heads, config.head_dim).constrained()

    def value_request(self, query: Array, key: Array, value: Array, *others: object) -> Array:
        return _group_mean(query, key)

    def mixed(
        self, query: Array, key: Array, value: Array, result: tuple[Array, Array], layer: Array | int
    ) -> tuple[Array, Array, Array]:
        products = _group_mean(query, key).astype(jnp.float32) * key.astype(jnp.float32)
        own = jnp.sum(products, axis=-1) * key.shape[-1] ** -0.5  # [B, T, K]
        return query, key, joined(result, own, value)

    def entries(self, sublayer: SubLayer) -> tuple[Entry, ...]:
        """The layer's key and mixed value, if it is a source."""
        if sublayer.site != ATTENTION or self.last:
            return ()
        when = None if self.stride == 1 else jnp.asarray(sublayer.layer % self.stride == 0)
        return (Entry((sublayer.key, sublayer.value), when),)


def _group_mean(query: Array, key: Array) -> Array:
    """The mean of a KV head's queries [B, T, K, H]."""
    grouped = query.reshape(*key.shape[:3], -1, key.shape[-1])  # [B, T, K, G, H]
    return jnp.mean(grouped.astype(jnp.float32), axis=3).astype(query.dtype)
