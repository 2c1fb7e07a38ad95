"""A decode step with few kernels: a layer's matrices packed by what they multiply, and its small work put together.

`Stack.walk` computes a step as the model is written, projection by projection: for one row 29 kernels a layer, each a
few microseconds long, where reading the weights takes a quarter of that. Here the same layer is written out for a step:
five products, of matrices that lie side by side; one norm and rotation of all heads; the depth entries of a layer are
written together with the next layer's own key and value, which stand behind them; and one merge of all parts of the
softmax. What is rounded, and where, is as in the model. It serves the paper's models and their plain counterparts, see
`check_packed`; all others run by the walk.

Axes: L layers, B rows, D width, N query heads, K key/value heads, H head_dim, F FFN hidden, C places of the cache, S
depth slots, E depth entries that a layer projects, O outputs of a product. A matrix lies as [O, D], a row for each
output: a product with one row of inputs is then one sum along the rows of memory.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.config import TransformerConfig
from moda_jax.inference import token_attention
from moda_jax.model.layers import rms_norm
from moda_jax.model.rotary import rotary_angles
from pallas_kernels import norm
from pallas_kernels import token_attention as kernels
from pallas_kernels.matvec import Results, gate, matvec
from pallas_kernels.operands import DepthKV

Array = jax.Array
PyTree = Any
CAPACITY_STEP = 128  # a cache of so many places, or a multiple, is one that the kernels take
Cached = tuple[tuple[Array, ...], tuple[Array, ...]]  # keys and values, an array for each layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedLayer:
    """Parameters of a layer. Matrices are in the compute dtype, scales float32.

    Attributes:
        heads: [(N + 2K) H or (N + 4K) H, D]: query, key, value; the attention entry's key and value where it is
            projected.
        output: [D, N H].
        hidden: [2F or 2F + 2 K H, D]: gate and up; the FFN entry's key and value where there is one.
        down: [D, F].
        attention_norm, ffn_norm: [D].
        query_norm, key_norm: [N H] and [K H]; both [H] where every head is normed by itself; None: no norm.
        config: of the model.
    """

    heads: Array
    output: Array
    hidden: Array
    down: Array
    attention_norm: Array
    ffn_norm: Array
    query_norm: Array | None
    key_norm: Array | None
    config: TransformerConfig = dataclasses.field(metadata={"static": True})


def check_packed(config: TransformerConfig) -> None:
    """Checks that a step of such a model can be computed here.

    Raises:
        NotImplementedError: it cannot, with the field that decides.
    """
    moda = config.moda
    fields = [
        ("depth", config.depth, ("none", "moda")), ("norm", config.norm, ("pre", "post")),
        ("norm_kind", config.norm_kind, ("rms",)), ("ffn", config.ffn, ("swiglu",)),
        ("biases", config.biases, (False,)),
    ]  # fmt: skip
    if config.depth == "moda":
        fields += [
            ("moda.key", moda.key, ("own",)), ("moda.read", moda.read, ("all",)), ("moda.chunk", moda.chunk, (1,)),
            ("moda.null_slot", moda.null_slot, (False,)), ("moda.entry_bias", moda.entry_bias, (False,)),
            ("moda.softmax", moda.softmax, ("joint",)), ("moda.entry_dtype", moda.entry_dtype, (None,)),
        ]  # fmt: skip
    for name, value, served in fields:
        if value not in served:
            raise NotImplementedError(f"packed decoding: model.{name}={value!r}: expected one of {served}")


def is_packable(config: TransformerConfig) -> bool:
    """Whether `check_packed` lets a model pass."""
    try:
        check_packed(config)
    except NotImplementedError:
        return False
    return True


def packed_layers(params: PyTree, config: TransformerConfig) -> tuple[PackedLayer, ...]:
    """All layers of a model's parameters, packed; jitted, since every matrix is copied once.

    Args:
        params: from `decode.inference_params`: "layers", a stack of the first L-1, and "last_layer".
        config: of the model.

    Raises:
        NotImplementedError: see `check_packed`.
    """
    check_packed(config)
    return _packed(params, config)


@functools.partial(jax.jit, static_argnames="config")
def _packed(params: PyTree, config: TransformerConfig) -> tuple[PackedLayer, ...]:
    stack = params.get("layers")
    count = 0 if stack is None else len(jax.tree.leaves(stack)[0])
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(count)]
    return tuple(_pack(layer, config) for layer in (*layers, params["last_layer"]))


def _pack(layer: PyTree, config: TransformerConfig) -> PackedLayer:
    attention, ffn, depth = layer["attention"], layer["ffn"], layer.get("depth", {})

    def outputs(*kernels: PyTree) -> Array:
        """Of kernels [D, ...], side by side: [O, D]."""
        return jnp.concatenate([k["kernel"].reshape(k["kernel"].shape[0], -1).T for k in kernels])

    def scale(name: str) -> Array | None:
        return attention[name]["scale"] if name in attention else None

    entries = [[depth[name]] if name in depth else [] for name in ("attention_kv", "ffn_kv")]
    output, down = attention["output"]["kernel"], ffn["down"]["kernel"]
    return PackedLayer(
        outputs(attention["query"], attention["key"], attention["value"], *entries[0]),
        output.reshape(-1, output.shape[-1]).T, outputs(ffn["gate"], ffn["up"], *entries[1]), down.T,
        layer["attention_norm"]["scale"], layer["ffn_norm"]["scale"], scale("query_norm"), scale("key_norm"),
        config,
    )  # fmt: skip


def unpacked(layers: tuple[PackedLayer, ...], config: TransformerConfig) -> PyTree:
    """The model's own parameters of packed layers: "last_layer", and "layers", a tuple, where there are any before."""
    own = [_unpack(layer, config) for layer in layers]
    return {"last_layer": own[-1]} | ({"layers": tuple(own[:-1])} if len(own) > 1 else {})


def _unpack(layer: PackedLayer, config: TransformerConfig) -> PyTree:
    N, K, H, F = config.num_heads, config.num_kv_heads, config.head_dim, config.ffn_width

    def kernel(matrix: Array, begin: int, *shape: int) -> PyTree:
        """Of the outputs from `begin` on, [D, *shape]."""
        size = functools.reduce(operator.mul, shape)
        return {"kernel": matrix[begin : begin + size].T.reshape(-1, *shape)}

    attention = {
        "query": kernel(layer.heads, 0, N, H), "key": kernel(layer.heads, N * H, K, H),
        "value": kernel(layer.heads, (N + K) * H, K, H), "output": {"kernel": layer.output.T.reshape(N, H, -1)},
    }  # fmt: skip
    if layer.query_norm is not None:
        attention |= {"query_norm": {"scale": layer.query_norm}, "key_norm": {"scale": layer.key_norm}}
    ffn = {
        "gate": kernel(layer.hidden, 0, F), "up": kernel(layer.hidden, F, F), "down": {"kernel": layer.down.T},
    }  # fmt: skip
    depth = {}
    for name, matrix, begin in (("attention_kv", layer.heads, (N + 2 * K) * H), ("ffn_kv", layer.hidden, 2 * F)):
        if matrix.shape[0] > begin:
            depth[name] = kernel(matrix, begin, 2, K, H)
    return {
        "attention": attention, "attention_norm": {"scale": layer.attention_norm}, "ffn": ffn,
        "ffn_norm": {"scale": layer.ffn_norm},
    } | ({"depth": depth} if depth else {})  # fmt: skip


def packed_step(
    layers: tuple[PackedLayer, ...],
    config: TransformerConfig,
    x: Array,
    cached: Cached,
    start: Array | None,
    length: Array,
    implementation: str | None,
    fused: bool | None = None,
) -> tuple[Array, Cached | None, Cached | None]:
    """One token of every row through all layers.

    Args:
        layers: from `packed_layers`.
        config: of the model.
        x: [B, D], the embedded tokens, in the compute dtype.
        cached: keys and values of all layers, [B, K, C, H] each.
        start: [B] or None; length: scalar: the places that are filled, see `decode.KVCache`.
        implementation: of attention over the cache and over the slots. Products have a kernel where attention has one.
        fused: see `decode.step`.

    Returns:
        [B, D], what the final norm receives; each layer's key and value [B, K, 1, H], to be written, and None; or None
        and the cache with them.

    Raises:
        NotImplementedError: fused, and the kernels do not take such a step.
    """
    begin = jnp.zeros(1, jnp.int32) if start is None else start
    rotation = None
    if config.rope_theta is not None:
        rotation = rotary_angles((length - begin)[:, None], config.head_dim, config.rope_theta)  # [B or 1, 1, H/2]
    token = _Token(config, rotation, start, length, implementation, norm.beside(implementation))
    if _is_fused(token, x, cached) if fused is None else fused:
        if fused:
            _check_fused(token, x, cached)
        return (_kernel_step if x.shape[0] == 1 else _rows_step)(layers, token, x, cached)
    depth = _Slots.empty(config, x)
    residual = _Residual(x, None, None)
    keys, values, entries = [], [], []
    for layer, key, value in zip(layers, *cached, strict=True):
        attended, key, value, more, depth, residual = token.attention(layer, residual, (key, value), entries, depth)
        keys.append(key)
        values.append(value)
        entries, residual = token.ffn(
            layer, residual.add(token.last_product(attended, layer.output), layer.attention_norm)
        )
        entries = more + entries
    return token.settled(residual), (tuple(keys), tuple(values)), None


def _is_fused(token: _Token, x: Array, cached: Cached) -> bool:
    """Whether attention runs by `pallas_kernels.token_attention` where nobody says so."""
    return _unserved(token) is None and kernels.best(**_shape(token.config, x, cached)) == "mosaic_gpu"


def _check_fused(token: _Token, x: Array, cached: Cached) -> None:
    """Raises NotImplementedError, with the reason, if attention of such a step has no kernels of that kind."""
    reason = _unserved(token)
    if reason is not None:
        raise NotImplementedError(f"fused attention of a decode step: {reason}")
    kernels.check_supported(**_shape(token.config, x, cached))


def _unserved(token: _Token) -> str | None:
    """Why the kernels do not take a step, whatever its shapes; None: they do."""
    config = token.config
    if not config.qk_norm or config.qk_norm_per_head:
        return f"qk_norm={config.qk_norm}, qk_norm_per_head={config.qk_norm_per_head}: expected one norm of all heads"
    if config.rope_theta is None:
        return "rope_theta=None: expected a rotary embedding"
    if config.depth == "moda" and config.moda.attn_kv:
        return "an attention entry with a projection of its own: expected own KV"
    if token.start is not None:
        return "rows that begin at different places: expected prompts of one length"
    if norm.beside(token.implementation) is not None:
        return f"implementation={token.implementation!r}: expected None or 'mosaic_gpu'"
    return None


def _shape(config: TransformerConfig, x: Array, cached: Cached) -> dict[str, Any]:
    return dict(
        dtype=x.dtype, rows=x.shape[0], num_heads=config.num_heads, num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim, capacity=cached[0][0].shape[2],
    )  # fmt: skip


def _kernel_step(
    layers: tuple[PackedLayer, ...], token: _Token, x: Array, cached: Cached
) -> tuple[Array, None, Cached]:
    """`packed_step` of one row with six launches a layer: cache and slots are written in place by those that read."""
    config, kernel = token.config, kernels.kernel(1)
    slots = _empty_slots(kernel, config, x)
    rotation = tuple(angle[0, 0] for angle in token.rotation)
    residual, entry, filled = _Residual(x, None, None), (), 0
    keys, values = [], []
    for layer, key, value in zip(layers, *cached, strict=True):
        x, _, raw = token.product(residual, layer.heads, layer.attention_norm)
        operands = kernel.Token(raw[0], layer.query_norm, layer.key_norm, rotation, *entry)
        attended, (key, value), slots = kernel.token_attention(
            operands, (key[0], value[0]), slots, token.length, np.int32(filled), epsilon=config.norm_epsilon
        )
        keys.append(key[None])
        values.append(value[None])
        filled += 1 + bool(entry)
        output = token.last_product(attended[None], layer.output)
        residual = _Residual(x, output, layer.attention_norm)
        x, hidden, projected = token.product(residual, layer.hidden, layer.ffn_norm, gated=config.ffn_width)
        residual = _Residual(x, token.last_product(hidden, layer.down), layer.ffn_norm)
        entry = () if projected is None else (projected[0], layer.key_norm)
    return token.settled(residual), None, (tuple(keys), tuple(values))


def _rows_step(layers: tuple[PackedLayer, ...], token: _Token, x: Array, cached: Cached) -> tuple[Array, None, Cached]:
    """`packed_step` of many rows with attention as one kernel, and the products by XLA with what it fuses to them. The
    kernel reads an entry where the product left it: cut out it would be a launch of its own."""
    config, kernel = token.config, kernels.kernel(x.shape[0])
    slots = _empty_slots(kernel, config, x)
    rotation = tuple(angle[0, 0] for angle in token.rotation)
    residual, entry, filled = _Residual(x, None, None), (), 0
    keys, values = [], []
    for layer, *held in zip(layers, *cached, strict=True):
        x, _, raw = token.product(residual, layer.heads, layer.attention_norm)
        operands = kernel.Token(raw, layer.query_norm, layer.key_norm, rotation, *entry)
        attended, (key, value), slots = kernel.token_attention(
            operands, tuple(held), slots, token.length, np.int32(filled), epsilon=config.norm_epsilon
        )
        keys.append(key)
        values.append(value)
        filled += 1 + bool(entry)
        residual = _Residual(x, token.last_product(attended, layer.output), layer.attention_norm)
        x, _, projected = token.product(residual, layer.hidden, layer.ffn_norm)
        hidden = gate(projected, config.ffn_width)
        residual = _Residual(x, token.last_product(hidden, layer.down), layer.ffn_norm)
        entry = () if projected.shape[1] == 2 * config.ffn_width else (projected, layer.key_norm)
    return token.settled(residual), None, (tuple(keys), tuple(values))


def _empty_slots(kernel: ModuleType, config: TransformerConfig, x: Array) -> tuple[Array, Array] | None:
    """Of the kernels, with one more than the layers write, for the last layer's own key and value."""
    if config.depth_slots == 0:
        return None
    shape = kernel.slots_shape(x.shape[0], config.depth_slots + 1, config.num_kv_heads, config.head_dim)
    return (jnp.zeros(shape, x.dtype),) * 2


@dataclasses.dataclass(frozen=True)
class _Residual:
    """x, and what is still to be added to it: y, which is normed first where norms stand behind sub-layers.

    Attributes:
        x: [B, D].
        y: [B, D] or None: nothing.
        scale: [D] of the sub-layer's norm.
    """

    x: Array
    y: Array | None
    scale: Array | None

    def add(self, y: Array, scale: Array) -> _Residual:
        """Of a settled one, with a sub-layer's output."""
        return _Residual(self.x, y, scale)


@dataclasses.dataclass(frozen=True)
class _Slots:
    """The token's depth stream.

    Attributes:
        key, value: [B, 1, S, K, H]; None: the model has none.
        filled: slots.
    """

    key: Array | None
    value: Array | None
    filled: int

    @classmethod
    def empty(cls, config: TransformerConfig, x: Array) -> _Slots:
        """With one slot more than the layers write, for the last layer's own key and value."""
        if config.depth_slots == 0:
            return cls(None, None, 0)
        shape = (x.shape[0], 1, config.depth_slots + 1, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, x.dtype), jnp.zeros(shape, x.dtype), 0)

    def write(self, key: Array, value: Array, *, keep: int) -> _Slots:
        """With entries [B, n, K, H] behind those that are filled, of which the first `keep` stay."""
        place = (0, 0, self.filled, 0, 0)
        key, value = (
            jax.lax.dynamic_update_slice(buffer, new[:, None], place)
            for buffer, new in ((self.key, key), (self.value, value))
        )
        return _Slots(key, value, self.filled + keep)


@dataclasses.dataclass(frozen=True)
class _Token:
    """What all layers of a step share.

    Attributes:
        config: of the model.
        rotation: cos and sin, [B or 1, 1, H/2]; None: no rotary embedding.
        start, length, implementation: see `packed_step`.
        products: implementation of the products.
    """

    config: TransformerConfig
    rotation: tuple[Array, Array] | None
    start: Array | None
    length: Array
    implementation: str | None
    products: str | None

    def settled(self, residual: _Residual) -> Array:
        """x with all that was to be added, [B, D]."""
        x, y = residual.x, residual.y
        return x + (rms_norm(y, residual.scale, self.config.norm_epsilon) if self.config.norm == "post" else y)

    def product(self, residual: _Residual, matrix: Array, input_scale: Array, *, gated: int = 0) -> Results:
        """Of x, settled, and its norm if that stands there, with a sub-layer's first matrix; see `matvec`."""
        post = self.config.norm == "post" and residual.y is not None
        return matvec(
            residual.x, matrix.astype(residual.x.dtype), residual.y, residual.scale if post else None,
            input_scale if self.config.norm == "pre" else None, gated=gated, epsilon=self.config.norm_epsilon,
            implementation=self.products,
        )  # fmt: skip

    def last_product(self, x: Array, matrix: Array) -> Array:
        """Of [B, D] with a sub-layer's last matrix."""
        return matvec(x, matrix.astype(x.dtype), implementation=self.products).outputs

    def attention(
        self,
        layer: PackedLayer,
        residual: _Residual,
        cached: tuple[Array, Array],
        entries: list[tuple[Array, Array, Array | None]],
        depth: _Slots,
    ) -> tuple[Array, Array, Array, list, _Slots, _Residual]:
        """The attention sub-layer up to its output projection.

        Args:
            entries: key and value [B, K, H] as projected, with the norm's scale of their layer, that the layer before
                left to be written.

        Returns:
            [B, N H]; the layer's key and value [B, K, 1, H]; its own such entries; the stream; x, settled.
        """
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        x, _, projected = self.product(residual, layer.heads, layer.attention_norm)
        projected = projected.reshape(x.shape[0], -1, H)  # [B, N + 2K or N + 4K, H]
        query, key, value, *more = jnp.split(projected, tuple(range(N, projected.shape[1], K)), axis=1)
        placed = self._placed(
            [query, *(entry for entry, _, _ in entries), key],
            [layer.query_norm, *(scale for _, _, scale in entries), layer.key_norm],
        )
        query, key = placed[:, None, :N], placed[:, -K:]
        part = self._over_cache(query, cached)
        own = key[:, None], value[:, None]  # [B, 1, K, H]
        if depth.key is None:
            beside = token_attention.of_itself(query, *own)
        else:  # own key and value stand behind the entries; they stay if they are the layer's entry
            count = len(entries) + 1
            keys = placed[:, N:].reshape(-1, count, K, H)
            values = jnp.stack([*(entry for _, entry, _ in entries), value], axis=1)
            depth = depth.write(keys, values, keep=count - len(more) // 2)
            seen = DepthKV(depth.key, depth.value, length=depth.filled + len(more) // 2)
            beside = token_attention.over_slots(query, seen, self.implementation)
        attended = token_attention.merge_all(part, beside)[0].astype(x.dtype)
        if depth.key is not None:  # the stream is read before it is written again: XLA would copy it otherwise
            attended, depth_key, depth_value = jax.lax.optimization_barrier((attended, depth.key, depth.value))
            depth = dataclasses.replace(depth, key=depth_key, value=depth_value)
        left = [(*more, layer.key_norm)] if more else []
        return (
            attended.reshape(x.shape[0], N * H), key[:, :, None], value[:, :, None], left, depth,
            _Residual(x, None, None),
        )  # fmt: skip

    def ffn(self, layer: PackedLayer, residual: _Residual) -> tuple[list, _Residual]:
        """The FFN sub-layer: its entries as of `attention`, and x with its output still to be added."""
        F, K, H = self.config.ffn_width, self.config.num_kv_heads, self.config.head_dim
        x, hidden, entry = self.product(residual, layer.hidden, layer.ffn_norm, gated=F)
        output = self.last_product(hidden, layer.down)
        left = []
        if entry is not None:
            key, value = jnp.split(entry.reshape(x.shape[0], 2 * K, H), 2, axis=1)
            left = [(key, value, layer.key_norm)]
        return left, _Residual(x, output, layer.ffn_norm)

    def _over_cache(self, query: Array, cached: tuple[Array, Array]):
        parts = token_attention.cache_parts(query, cached, self.implementation)
        return token_attention.over_cache(query, cached, self.start, self.length, self.implementation, parts)

    def _placed(self, groups: list[Array], scales: list[Array | None]) -> Array:
        """Raw queries and keys as the softmax gets them, side by side: normed, each group by itself, and rotated.

        Args:
            groups: [B, heads, H] each.
            scales: [heads H] or [H] each, or all None.
        """
        H = self.config.head_dim
        wide = jnp.concatenate(groups, axis=1).astype(jnp.float32)  # [B, all heads, H]
        if self.config.qk_norm:
            sums = jnp.sum(jnp.square(wide), axis=-1)  # [B, all heads]
            inverse, end = [], 0
            for group in groups:
                mine, count = [sums[:, end + i] for i in range(group.shape[1])], group.shape[1]
                end += count
                if self.config.qk_norm_per_head:
                    means = [one / H for one in mine]
                else:  # written out: a sum of sums would be a kernel of its own
                    means = [functools.reduce(operator.add, mine) / (count * H)] * count
                inverse.append(jax.lax.rsqrt(jnp.stack(means, axis=1) + self.config.norm_epsilon))
            scale = [
                jnp.broadcast_to(scale.reshape(-1, H), (group.shape[1], H))
                for group, scale in zip(groups, scales, strict=True)
            ]
            wide = jnp.concatenate(scale)[None] * (wide * jnp.concatenate(inverse, axis=1)[..., None])
        if self.rotation is not None:
            cos, sin = (angle[:, 0] for angle in self.rotation)  # [B or 1, H/2]
            wide = norm.rotate(wide, cos, sin)
        return wide.astype(groups[0].dtype)
