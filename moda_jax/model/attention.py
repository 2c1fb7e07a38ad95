"""The projections around the attention op.

Axes: B batch, T tokens, D model width, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.model.initial_keys import InitialKeys
from moda_jax.model.layers import HeadsNorm, PerHeadNorm, Projection
from moda_jax.model.module import Module
from moda_jax.model.rotary import rotate
from pallas_kernels.norm import beside

Array = jax.Array


class Attention(Module):
    """The projections of one attention sub-layer (OLMo 2: no biases, QK-norm over the full width, rotary positions).

    `output` maps attention's result [B, T, N, H] back to [B, T, D]. The op between `project` and `output` belongs to
    the depth mechanism; this module knows nothing of depth.

    Args:
        width: D.
        num_heads, num_kv_heads, head_dim: N, K, H; K divides N.
        qk_norm: normalise the query and the key projection, all heads together.
        qk_norm_per_head: normalise each head by itself, with one scale for all heads.
        rope_theta: base of the rotary wavelengths; None: queries and keys are not rotated.
        norm_epsilon: of the QK-norm.
        bias: every projection has one.
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
        qk_norm_per_head: bool = False,
        rope_theta: float | None = 500000.0,
        norm_epsilon: float = 1e-6,
        bias: bool = False,
        initializer_range: float = 0.02,
        implementation: str | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs | InitialKeys,
    ) -> None:
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads}: expected a multiple of num_kv_heads={num_kv_heads}")
        if qk_norm_per_head and not qk_norm:
            raise ValueError("qk_norm_per_head=True: expected False with qk_norm=False")
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"head_dim={head_dim}: expected an even number (rotary pairs)")
        keys = InitialKeys.of(rngs)

        def projection(name: str, spec: str, *shape: int) -> Projection:
            return Projection(
                spec, shape, initializer_range=initializer_range, dtype=dtype, bias=bias, rngs=keys.at(name)
            )

        self.rope_theta = rope_theta
        self.query = projection("query", "btd,dnh->btnh", width, num_heads, head_dim)
        self.key = projection("key", "btd,dkh->btkh", width, num_kv_heads, head_dim)
        self.value = projection("value", "btd,dkh->btkh", width, num_kv_heads, head_dim)
        self.output = projection("output", "btnh,nhd->btd", num_heads, head_dim, width)
        options = {"epsilon": norm_epsilon, "implementation": beside(implementation)}

        def norm(heads: int, axis: str) -> HeadsNorm | None:
            if not qk_norm:
                return None
            if qk_norm_per_head:
                return PerHeadNorm(head_dim, **options)
            return HeadsNorm(heads, head_dim, axis=axis, **options)

        self.query_norm = norm(num_heads, "heads")
        self.key_norm = norm(num_kv_heads, "kv_heads")

    def project(
        self, x: Array, positions: Array, key_input: Array | None = None, value_input: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """x [B, T, D] to query [B, T, N, H], key and value [B, T, K, H]; normalised, rotated to `positions`.

        `positions` is [B, T] int32, or [B, T, axes] as `rotary.rotate` takes them. `key_input` and `value_input`
        [B, T, D] stand in x's place for key and value where they are given.
        """
        query = self._placed(self.query(x), self.query_norm, positions)
        key = self.key(x if key_input is None else key_input)
        value = self.value(x if value_input is None else value_input)
        return query, self.place_key(key, positions), value

    def place_key(self, key: Array, positions: Array) -> Array:
        """A raw key projection [B, T, K, H] after this layer's key norm and rotation."""
        return self._placed(key, self.key_norm, positions)

    def _placed(self, x: Array, norm: HeadsNorm | None, positions: Array) -> Array:
        if norm is None:
            return x if self.rope_theta is None else rotate(x, positions, self.rope_theta)
        return norm(x, positions, self.rope_theta)


def default_positions(x: Array) -> Array:
    """0..T-1 for every row of x [B, T, ...]: [B, T] int32."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
