"""Attention with a depth stream: the projections around the op, and the layer that other models import.

Axes: B batch, T tokens, S depth slots, D model width, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.model.depth_mechanism import MixtureOfDepths
from moda_jax.model.depth_stream import DepthStream
from moda_jax.model.layers import HeadsNorm, Projection, rotate
from moda_jax.model.precision import compute_dtype
from pallas_kernels.norm import beside

Array = jax.Array


class Attention(nnx.Module):
    """The projections of one attention sub-layer (OLMo 2: no biases, QK-norm over the full width, rotary positions).

    `output` maps attention's result [B, T, N, H] back to [B, T, D]. The op between `project` and `output` belongs to
    the depth mechanism; this module knows nothing of depth.

    Args:
        width: D.
        num_heads, num_kv_heads, head_dim: N, K, H; K divides N.
        qk_norm: normalise the query and the key projection.
        rope_theta: base of the rotary wavelengths.
        norm_epsilon: of the QK-norm.
        initializer_range: standard deviation of the kernels at the start.
        implementation: of the op, which the QK-norm's backward goes by too (`pallas_kernels.norm.beside`).
        dtype: compute dtype.
        rngs: source of the kernels.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qk_norm: bool = True,
        rope_theta: float = 500000.0,
        norm_epsilon: float = 1e-6,
        initializer_range: float = 0.02,
        implementation: str | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads}: expected a multiple of num_kv_heads={num_kv_heads}")
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim}: expected an even number (rotary pairs)")
        options = {"initializer_range": initializer_range, "dtype": dtype, "rngs": rngs}
        self.rope_theta = rope_theta
        self.query = Projection("btd,dnh->btnh", (width, num_heads, head_dim), **options)
        self.key = Projection("btd,dkh->btkh", (width, num_kv_heads, head_dim), **options)
        self.value = Projection("btd,dkh->btkh", (width, num_kv_heads, head_dim), **options)
        self.output = Projection("btnh,nhd->btd", (num_heads, head_dim, width), **options)
        norm = {"epsilon": norm_epsilon, "implementation": beside(implementation)}
        self.query_norm = HeadsNorm(num_heads, head_dim, **norm) if qk_norm else None
        self.key_norm = HeadsNorm(num_kv_heads, head_dim, **norm) if qk_norm else None

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """x [B, T, D] to query [B, T, N, H], key and value [B, T, K, H]; normalised, rotated to `positions` [B, T]."""
        query = self._placed(self.query(x), self.query_norm, positions)
        return query, self.place_key(self.key(x), positions), self.value(x)

    def place_key(self, key: Array, positions: Array) -> Array:
        """A raw key projection [B, T, K, H] after this layer's key norm and rotation."""
        return self._placed(key, self.key_norm, positions)

    def _placed(self, x: Array, norm: HeadsNorm | None, positions: Array) -> Array:
        if norm is None:
            return rotate(x, positions, self.rope_theta)
        return norm(x, positions, self.rope_theta)


class MoDAAttention(Attention):
    """Mixture-of-depths attention as one layer, for any model: reads the depth stream, then appends its own KV to it.

        y_t = W_o softmax([q_t . K[0..t], q_t . K_depth[t, :length]] / sqrt(H)) [V[0..t]; V_depth[t, :length]]

    Differentiating a stack of these layers with plain autodiff is right, but keeps one copy of the depth stream per
    layer (memory grows with the square of the depth). `depth_scan` runs the same stack with one buffer.

    Args:
        width, num_heads, num_kv_heads, head_dim: D, N, K, H; K divides N.
        ffn_kv: holds the projection that `write_ffn` needs (the paper's default variant).
        attention_kv: writes a projection of the input instead of the layer's own KV.
        qk_norm, rope_theta, norm_epsilon, initializer_range: as in `Attention`.
        implementation: of the op, see `pallas_kernels.moda_attention`; None: the best for the device. XLA's partitioner
            cannot split a kernel: with arrays that are sharded over a mesh of your own, call the layer inside of
            `jax.shard_map`, or take "xla".
        dtype: compute dtype; None: bfloat16 on a GPU, float32 elsewhere.
        rngs: source of the kernels.

    Source: arXiv 2603.15619, section 3.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        ffn_kv: bool = False,
        attention_kv: bool = False,
        qk_norm: bool = True,
        rope_theta: float = 500000.0,
        norm_epsilon: float = 1e-6,
        initializer_range: float = 0.02,
        implementation: str | None = None,
        dtype: jnp.dtype | str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        dtype = compute_dtype(dtype)
        super().__init__(
            width, num_heads, num_kv_heads, head_dim, qk_norm=qk_norm, rope_theta=rope_theta,
            norm_epsilon=norm_epsilon, initializer_range=initializer_range, implementation=implementation, dtype=dtype,
            rngs=rngs,
        )  # fmt: skip
        self.implementation = implementation
        self.depth = MixtureOfDepths(
            width, num_kv_heads, head_dim, ffn_kv=ffn_kv, attention_kv=attention_kv,
            initializer_range=initializer_range, dtype=dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(
        self,
        x: Array,
        stream: DepthStream,
        segment_ids: Array | None = None,
        positions: Array | None = None,
    ) -> tuple[Array, DepthStream]:
        """Attends over the sequence and the depth stream, then writes this layer's entry.

        Args:
            x: [B, T, D].
            stream: what earlier layers wrote.
            segment_ids: [B, T] int32; a token sees the sequence KV of its own segment only. The depth part needs no
                mask.
            positions: [B, T] int32 for the rotary embedding; None: 0..T-1.

        Returns:
            y [B, T, D] and the stream with one more entry.

        Raises:
            ValueError: a full stream (when its length is concrete), a stream of another shape or dtype than the layer
                reads and writes, or shapes that do not fit.
        """
        self._check_stream(x, stream)
        positions = default_positions(x) if positions is None else positions
        query, key, value = self.project(x, positions)
        attended = self.depth.operate(
            query, key, value, stream, segment_ids=segment_ids, implementation=self.implementation
        )
        entries = self.depth.attention_entries(self, x, key, value, positions)
        return self.output(attended), self.depth.write(stream, entries)

    def write_ffn(self, inputs: Array, stream: DepthStream, positions: Array | None = None) -> DepthStream:
        """The stream after the FFN sub-layer's entry, projected from its input `inputs` [B, T, D].

        Raises:
            ValueError: the layer was built without `ffn_kv=True`, or a stream that does not fit, as for the call.
        """
        self._check_stream(inputs, stream)
        if self.depth.ffn_kv is None:
            raise ValueError("MoDAAttention.write_ffn: the layer was built with ffn_kv=False, expected ffn_kv=True")
        positions = default_positions(inputs) if positions is None else positions
        return self.depth.write(stream, self.depth.ffn_entries(self, inputs, positions))

    def _check_stream(self, x: Array, stream: DepthStream) -> None:
        """Raises ValueError unless the stream stands beside the tokens of x, in the layer's heads and compute dtype.

        It is not cast: that would be a copy of the whole buffer in every layer.
        """
        _, heads, head_dim = self.key.kernel.shape
        expected = (*x.shape[:2], stream.slots, heads, head_dim)
        for name, array in (("key", stream.key), ("value", stream.value)):
            if array.shape != expected or array.dtype != self.key.dtype:
                raise ValueError(
                    f"stream.{name} is {array.dtype}{list(array.shape)}: expected the layer's compute dtype "
                    f"{jnp.dtype(self.key.dtype)} and [B, T, S, K, H] = {list(expected)}, as of "
                    f"DepthStream.empty(..., dtype={str(jnp.dtype(self.key.dtype))!r})"
                )


def default_positions(x: Array) -> Array:
    """0..T-1 for every row of x [B, T, ...]: [B, T] int32."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
