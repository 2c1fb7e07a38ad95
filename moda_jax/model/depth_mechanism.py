"""Depth mechanisms: what a layer reads from earlier layers, how it operates on it, and what it writes for later ones.

One object per mechanism, with the paper's three steps (section 3, table 1). The transformer block calls the object and
never asks which one it is: a new mechanism is a new class here, not a branch in the block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.model.depth_stream import DepthStream, Entry
from moda_jax.model.layers import Projection
from moda_jax.parallel.attention import attend

if TYPE_CHECKING:
    from moda_jax.config import TransformerConfig
    from moda_jax.model.attention import Attention

Array = jax.Array


class DepthMechanism(nnx.Module):
    """Depth residual: the identity read and the add that every block does anyway. The base of all other mechanisms.

    Attributes:
        entries_per_layer: slots that a writing layer fills.
        writes_own_key_value: the first entry is the attention's own (key, value), unchanged.
        reads_in_operator: the stream is read by the attention operator alone (`read` is the identity and `operate` is
            `moda_attention` over the stream). The layer loop can then keep attention's output instead of recomputing
            it.
    """

    entries_per_layer: int = 0
    writes_own_key_value: bool = False
    reads_in_operator: bool = True

    def read(self, x: Array, stream: DepthStream) -> Array:
        """The layer's input [B, T, D], given the residual stream x and the depth stream."""
        del stream
        return x

    def operate(
        self,
        query: Array,
        key: Array,
        value: Array,
        stream: DepthStream,
        *,
        segment_ids: Array | None,
        implementation: str | None,
    ) -> Array:
        """Attention's output [B, T, N, H]; the filled slots of `stream`, none here, are part of the softmax."""
        return attend(
            query, key, value, stream.key, stream.value,
            depth_length=stream.length, segment_ids=segment_ids, implementation=implementation,
        )  # fmt: skip

    def attention_entries(
        self, attention: Attention, inputs: Array, key: Array, value: Array, positions: Array
    ) -> tuple[Entry, ...]:
        """Entries that the attention sub-layer writes; `inputs` [B, T, D] is what its first matmul received."""
        del attention, inputs, key, value, positions
        return ()

    def ffn_entries(self, attention: Attention, inputs: Array, positions: Array) -> tuple[Entry, ...]:
        """Entries that the FFN sub-layer writes; `inputs` [B, T, D] is what its first matmul received."""
        del attention, inputs, positions
        return ()

    def write(self, stream: DepthStream, entries: tuple[Entry, ...]) -> DepthStream:
        """The stream after this layer: its entries appended in order."""
        for key, value in entries:
            stream = stream.append(key, value)
        return stream


class MixtureOfDepths(DepthMechanism):
    """MoDA: sequence KV and depth KV under one softmax; each layer appends its keys and values (paper section 3.2).

    Args:
        width, num_kv_heads, head_dim: of the layer.
        ffn_kv: the FFN sub-layer writes an entry too, a linear projection of its input (table 3 row 4).
        attention_kv: the attention sub-layer writes a projection of its input instead of its own KV (row 5).
        writes: False for a layer that reads only (the last): no entries, no projections.
        initializer_range: standard deviation of the projections at the start.
        dtype: compute dtype.
        rngs: source of the projections.
    """

    def __init__(
        self,
        width: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        ffn_kv: bool,
        attention_kv: bool,
        writes: bool = True,
        initializer_range: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        def projection() -> Projection:
            return Projection(
                "btd,dckh->btckh", (width, 2, num_kv_heads, head_dim),
                initializer_range=initializer_range, dtype=dtype, rngs=rngs,
            )  # fmt: skip

        self.entries_per_layer = (1 + int(ffn_kv)) if writes else 0
        self.writes_own_key_value = writes and not attention_kv
        self.ffn_kv = projection() if writes and ffn_kv else None
        self.attention_kv = projection() if writes and attention_kv else None

    def attention_entries(
        self, attention: Attention, inputs: Array, key: Array, value: Array, positions: Array
    ) -> tuple[Entry, ...]:
        """One entry: the sequence key and value themselves, or the projection that replaces them; none in the last."""
        if self.writes_own_key_value:
            return ((key, value),)
        if self.attention_kv is None:
            return ()
        return (_projected_entry(self.attention_kv, attention, inputs, positions),)

    def ffn_entries(self, attention: Attention, inputs: Array, positions: Array) -> tuple[Entry, ...]:
        """One entry, projected from the FFN's input, or none."""
        if self.ffn_kv is None:
            return ()
        return (_projected_entry(self.ffn_kv, attention, inputs, positions),)


def _projected_entry(projection: Projection, attention: Attention, inputs: Array, positions: Array) -> Entry:
    """A depth entry from `inputs` [B, T, D]; the key gets the layer's own key norm and rotation, as its own keys do."""
    projected = projection(inputs)  # [B, T, 2, K, H]
    return attention.place_key(projected[:, :, 0], positions), projected[:, :, 1]


def make_mechanism(config: TransformerConfig, *, writes: bool, dtype: jnp.dtype, rngs: nnx.Rngs) -> DepthMechanism:
    """The mechanism that `config.depth` names. A layer that does not write (the last) has no projections of its own."""
    if config.depth == "none":
        return DepthMechanism()
    return MixtureOfDepths(
        config.width, config.num_kv_heads, config.head_dim,
        ffn_kv=config.depth_ffn_kv, attention_kv=config.depth_attn_kv, writes=writes,
        initializer_range=config.initializer_range, dtype=dtype, rngs=rngs,
    )  # fmt: skip
