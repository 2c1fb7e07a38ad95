"""Decoding with a KV cache: the prompt at once, then one token per step.

What is kept over time is each layer's sequence keys and values, as in plain attention. The depth stream of a token is
read by that token alone, so in decoding it is the current token's, [B, 1, S, K, H]: filled anew by every step and never
cached. MoDA's cache is byte for byte as large as plain attention's.

Axes: L layers, B rows, C places of the cache, T tokens, S depth slots, N query heads, K key/value heads, G = N / K, H
head_dim, D width, V vocabulary. Rows are aligned at their ends: a short prompt begins at place `start`, what stands
before it is padding that nobody sees, and every row's next token goes to the same place. So a step writes its keys and
values with one update per array.

A step does not change the cache while the layers run: a layer's own key and value join the softmax as one more depth
slot, behind the filled ones, and all layers' are written to the cache together at the end, in place. XLA copies a
buffer that it believes to be read after it is written, so the order is spelled out: the cache travels through the layer
loop, and a barrier stands between the last layer and the write.

Shapes are static: one compilation of `prefill` per (rows, prompt length) and one of `decode` per (rows, capacity).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.config import TransformerConfig
from moda_jax.inference.sampling import SamplingConfig, sample
from moda_jax.model.depth.operations import SoftmaxAttention
from moda_jax.model.depth.registry import find_mechanism
from moda_jax.model.depth.stream import DepthStream, Stream, is_traced
from moda_jax.model.function import ModelFunction
from moda_jax.model.precision import compute_dtype, dot_precision
from moda_jax.model.stack import Step, cast_matrices
from moda_jax.model.transformer import Transformer
from pallas_kernels import depth_attention, dispatch
from pallas_kernels.block import forward
from pallas_kernels.operands import Call, DepthKV, Mask

Array = jax.Array
PyTree = Any

MASKED = float(jnp.finfo(jnp.float32).min)  # a masked logit: exp(MASKED - any real logit) is exactly 0
PREFILL_TOKENS = 2**15  # tokens of a group of rows that run through the prompt pass together: bounds its depth stream
# How a step multiplies with the cache. "dot": matrix products; "reduce": products and sums that XLA fuses; "kernel":
# the kernels of `pallas_kernels`, 16-bit dtypes on Hopper. `python -m benchmarks.decode` times them.
PRODUCTS = ("dot", "reduce", "kernel")
# Whether the layers of a step are compiled one by one: no layer's weights or cache are then cut out of a stack. On an
# H100, 700M model with depth, one row: 3.6 ms a step, against 4.4 in a loop ("reduce"); see benchmarks/results.
DEFAULT_UNROLL = {"cpu": False, "gpu": True}


# "kernel" cuts each row's cache into parts, one for each CTA: enough of them for two on each multiprocessor, of no
# fewer places than two blocks of the kernel have.
KERNEL_CTAS = 2 * 132
KERNEL_PLACES = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Sequence keys and values of all layers.

    Attributes:
        key, value: [L, B, K, C, H]; or a tuple of L arrays [B, K, C, H], where the layers are unrolled.
        length: int32 scalar, places that are filled, in every row.
        start: [B] int32, a row's first place that is no padding; None: no row has any.
    """

    key: Array | tuple[Array, ...]
    value: Array | tuple[Array, ...]
    length: Array
    start: Array | None

    @classmethod
    def empty(cls, config: TransformerConfig, batch: int, capacity: int, start: Array | None) -> KVCache:
        """A cache of `capacity` places for each of `batch` rows, in the compute dtype."""
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
        zeros = jnp.zeros(shape, compute_dtype(config.dtype))
        return cls(zeros, zeros, jnp.int32(0), None if start is None else start.astype(jnp.int32))

    @property
    def capacity(self) -> int:
        """C, the number of places."""
        return jax.tree.leaves(self.key)[0].shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((self.key, self.value)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that decoding carries from step to step.

    Attributes:
        cache: of the tokens before `token`.
        token: [B] int32, chosen, and not yet run through the model.
        keys: [B] typed PRNG keys.
        count: int32 scalar, tokens chosen so far.
    """

    cache: KVCache
    token: Array
    keys: Array
    count: Array


def inference_params(params: PyTree, config: TransformerConfig) -> PyTree:
    """Parameters as inference reads them: matrices in the compute dtype, cast once; all others stay float32.

    Args:
        params: see `TrainState`.
        config: of the model.
    """
    return cast_matrices(params, compute_dtype(config.dtype))


def decode_params(params: PyTree, *, unroll: bool | None = None) -> PyTree:
    """Parameters as decoding reads them.

    Args:
        params: from `inference_params`.
        unroll: the layers as a tuple of separate arrays instead of one stack. A step then compiles every layer by
            itself. None: the device's default.
    """
    unroll = DEFAULT_UNROLL[_platform()] if unroll is None else unroll
    return params | {"layers": _unstacked(params["layers"])} if unroll and "layers" in params else params


@jax.jit
def _unstacked(layers: PyTree) -> tuple[PyTree, ...]:
    """A tree per layer from a tree of stacks."""
    count = len(jax.tree.leaves(layers)[0])
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(count))


def available_products(config: TransformerConfig) -> tuple[str, ...]:
    """Those of `PRODUCTS` that the default device runs, the default last: the fastest of them."""
    if _platform() == "cpu":
        return ("reduce", "dot")
    group, dtype, scale = config.num_heads // config.num_kv_heads, compute_dtype(config.dtype), config.head_dim**-0.5
    row, keys = (jax.ShapeDtypeStruct((1, n, 1, config.head_dim), dtype) for n in (group, KERNEL_PLACES))
    calls = [Call(row, keys, keys, scale=scale)]
    mechanism = find_mechanism(config.depth)
    if mechanism.softmax_slots and mechanism.slots(config):
        query = jax.ShapeDtypeStruct((1, 1, config.num_heads, config.head_dim), dtype)
        slots = (1, 1, mechanism.slots(config) + 1, config.num_kv_heads, config.head_dim)
        slots = jax.ShapeDtypeStruct(slots, dtype)
        calls.append(Call(query, depth=DepthKV(slots, slots), scale=scale))
    kernels = all(dispatch.resolve(None, call) == "mosaic_gpu" for call in calls)
    return ("dot", "reduce", "kernel") if kernels else ("dot", "reduce")


def model_config(model: ModelFunction, params: PyTree) -> TransformerConfig:
    """The config of the model that `params` belong to."""
    return _module(model, params).config


@functools.partial(jax.jit, static_argnames=("model", "capacity", "padded"))
def prefill(
    model: ModelFunction, params: PyTree, tokens: Array, start: Array, *, capacity: int, padded: bool
) -> tuple[Array, KVCache]:
    """Runs the prompts through the model, by its own forward pass, and keeps their keys and values.

    Args:
        model: of a `Transformer`.
        params: from `decode_params`.
        tokens: [B, T] int32, every row's prompt at its end; anything before it.
        start: [B] int32, where a row's prompt begins.
        capacity: C, at least T.
        padded: whether any row begins after place 0.

    Returns:
        Logits [B, V] float32 of the token after the prompt, and the cache.
    """
    module = _module(model, params)
    batch, T = tokens.shape
    rows = _group_rows(batch, T)
    cache = KVCache.empty(module.config, batch, capacity, start if padded else None)

    def group(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        hidden, key, value = carry
        tokens_i, start_i = (jax.lax.dynamic_slice_in_dim(x, i * rows, rows) for x in (tokens, start))
        x, key_i, value_i = _prompt_pass(module, params, tokens_i, start_i, padded)
        place = (0, i * rows, 0, 0, 0)
        key, value = (jax.lax.dynamic_update_slice(a, b, place) for a, b in ((key, key_i), (value, value_i)))
        return jax.lax.dynamic_update_slice_in_dim(hidden, x, i * rows, 0), key, value

    hidden = jnp.zeros((batch, 1, module.config.width), cache.key.dtype)
    hidden, key, value = jax.lax.fori_loop(0, batch // rows, group, (hidden, cache.key, cache.value))
    if isinstance(params.get("layers"), tuple):
        key, value = tuple(key), tuple(value)
    return module.logits(hidden)[:, 0], KVCache(key, value, jnp.int32(T), cache.start)


@functools.partial(jax.jit, static_argnames=("model", "products"), donate_argnames="cache")
def step(
    model: ModelFunction, params: PyTree, cache: KVCache, tokens: Array, *, products: str | None = None
) -> tuple[Array, KVCache]:
    """One token of every row.

    Args:
        model, params: as in `prefill`.
        cache: of the tokens before; donated. It must have a free place.
        tokens: [B] int32.
        products: one of `PRODUCTS`; None: the last of `available_products`.

    Returns:
        Logits [B, V] float32 of the next token, and the cache with this one.
    """
    return _step(_module(model, params), params, cache, tokens, products)


@functools.partial(
    jax.jit, static_argnames=("model", "num_steps", "sampling", "vocab_size", "products"), donate_argnames="state"
)
def decode(
    model: ModelFunction,
    params: PyTree,
    state: DecodeState,
    *,
    num_steps: int,
    sampling: SamplingConfig,
    vocab_size: int,
    products: str | None = None,
) -> tuple[DecodeState, Array]:
    """`num_steps` tokens of every row, without a word to the host in between.

    Args:
        model, params: as in `prefill`.
        state: from `start` or from the call before; donated.
        num_steps: tokens; as many places of the cache must be free.
        sampling: how tokens are chosen.
        vocab_size: tokens 0..vocab_size-1 can be chosen: the tokenizer's vocabulary, which the model's may exceed.
        products: as in `step`.

    Returns:
        The state, and the tokens [B, num_steps] int32, of which the first is the one that `state` held.
    """
    module = _module(model, params)

    def body(i: Array, carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, tokens = carry
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, state.token[:, None], i, axis=1)
        logits, cache = _step(module, params, state.cache, state.token, products)
        return _choose(logits, cache, state.keys, state.count, sampling, vocab_size), tokens

    tokens = jnp.zeros((state.token.shape[0], num_steps), jnp.int32)
    return jax.lax.fori_loop(0, num_steps, body, (state, tokens))


@functools.partial(jax.jit, static_argnames=("sampling", "vocab_size"), donate_argnames="cache")
def start(logits: Array, cache: KVCache, keys: Array, *, sampling: SamplingConfig, vocab_size: int) -> DecodeState:
    """The state after `prefill`: chooses the first token from its logits. Arguments as in `decode`."""
    return _choose(logits, cache, keys, jnp.int32(0), sampling, vocab_size)


def _choose(logits, cache, keys, count, sampling, vocab_size) -> DecodeState:
    """The state with one more token; the n-th token's randomness is the row's key with n folded in."""
    drawn = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, count)
    return DecodeState(cache, sample(logits[:, :vocab_size], drawn, sampling), keys, count + 1)


# The prompt.


class _Prompt(Step):
    """Leaves each layer's keys and values behind, as the softmax had them."""

    def attend(self, operation, request, stream, shared, number, held):
        _, key, value = request
        left = key.swapaxes(1, 2), value.swapaxes(1, 2)  # [B, K, T, H]
        return operation(request, stream, shared), left, stream, 0


def _prompt_pass(
    module: Transformer, params: PyTree, tokens: Array, start: Array, padded: bool
) -> tuple[Array, Array, Array]:
    """tokens [B, T] to the last place's normed hidden state [B, 1, D], and all layers' KV [L, B, K, T, H]."""
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.maximum(place - start[:, None], 0)  # [B, T]
    segment_ids = (place >= start[:, None]).astype(jnp.int32) if padded else None
    stacked = params.get("layers")
    if isinstance(stacked, tuple):  # one layer is compiled here all the same
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked)
    hidden, (key, value), _ = module.walk(
        module.embedding(tokens), positions, segment_ids, _Prompt(), layer_params=stacked, last_token_only=True
    )
    return hidden, key, value


def _group_rows(batch: int, tokens: int) -> int:
    """Rows of a group: the most that divide the batch and have at most PREFILL_TOKENS tokens together."""
    return max(
        rows for rows in range(1, batch + 1) if batch % rows == 0 and (rows == 1 or rows * tokens <= PREFILL_TOKENS)
    )


# A step.


@dataclasses.dataclass(frozen=True)
class _Token(Step):
    """One token: attention's softmax spans the cache, the depth slots if they are part of it, and the token itself.

    Attributes:
        start, length: of the cache.
        products: with the cache.
    """

    start: Array | None
    length: Array
    products: str

    spare_slots = 1  # for the KV of the layer that runs
    numbered = True

    def attend(
        self,
        operation: SoftmaxAttention,
        request: tuple[Array, Array, Array],
        stream: Stream,
        shared: tuple,
        number: Array | int,
        held: tuple[PyTree, PyTree],
    ) -> tuple[Array, tuple[Array, Array], Stream, int]:
        query, key, value = request
        own = key.swapaxes(1, 2), value.swapaxes(1, 2)  # [B, K, 1, H]
        cached_key, cached_value = (a[number] if isinstance(a, tuple) else _layer_of(a, number) for a in held)
        if not operation.reads_slots:
            beside = DepthStream(key[:, :, None], value[:, :, None], np.int32(1))
            attended = self._attend(query, cached_key, cached_value, beside)
            return attended, own, stream, 0
        beside = stream.append(key, value)
        attended = self._attend(query, cached_key, cached_value, beside)
        # The stream is read before it is written again: XLA would copy it otherwise, as in the layer loop.
        attended, beside = jax.lax.optimization_barrier((attended, beside))
        return attended, own, beside.with_length(stream.length), 1

    def _attend(self, query: Array, cached_key: Array, cached_value: Array, beside: DepthStream) -> Array:
        return _attend(query, cached_key, cached_value, self.start, self.length, beside, self.products)


def _layer_of(cached: Array, number: Array | int) -> Array:
    """One layer of a stacked cache: [B, K, C, H]."""
    return cached[number] if isinstance(number, int) else jax.lax.dynamic_index_in_dim(cached, number, keepdims=False)


def _step(
    module: Transformer, params: PyTree, cache: KVCache, tokens: Array, products: str | None
) -> tuple[Array, KVCache]:
    products = products or available_products(module.config)[-1]
    begin = jnp.zeros(len(tokens), jnp.int32) if cache.start is None else cache.start
    positions = (cache.length - begin)[:, None]  # [B, 1]
    hidden, own, (all_keys, all_values) = module.walk(
        module.embedding(tokens[:, None]), positions, None, _Token(cache.start, cache.length, products),
        held=(cache.key, cache.value), layer_params=params.get("layers"),
    )  # fmt: skip
    cache = dataclasses.replace(cache, key=all_keys, value=all_values)
    logits = module.logits(hidden)[:, 0]
    key, value = zip(*own, strict=True) if isinstance(cache.key, tuple) else own
    logits, key, value = jax.lax.optimization_barrier((logits, key, value))  # written after all was read
    return logits, _write(cache, key, value)


def _write(cache: KVCache, key: PyTree, value: PyTree) -> KVCache:
    """The cache with one more place filled, from [..., B, K, 1, H]."""

    def update(buffer: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, cache.length, axis=buffer.ndim - 2)

    return KVCache(
        jax.tree.map(update, cache.key, key), jax.tree.map(update, cache.value, value), cache.length + 1, cache.start
    )


def _attend(
    query: Array,
    cached_key: Array,
    cached_value: Array,
    start: Array | None,
    length: Array,
    beside: DepthStream,
    products: str,
) -> Array:
    """One softmax of the current token over the cache and the slots beside it: the depth stream and its own KV.

    Args:
        query: [B, 1, N, H].
        cached_key, cached_value: [B, K, C, H].
        start: [B], a row's first place that counts; None: 0.
        length: scalar, the first place that does not count any more.
        beside: of this token, [B, 1, S, K, H], with at least one filled slot.
        products: with the cache.

    Returns:
        [B, 1, N, H] in the query's dtype; logits, softmax and sums are float32.
    """
    scale = query.shape[-1] ** -0.5
    if products == "kernel":
        return _attend_by_kernels(query, cached_key, cached_value, start, length, beside, scale)
    batch, _, heads, head_dim = query.shape
    kv_heads, capacity = cached_key.shape[1:3]
    queries = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)  # [B, K, G, H]
    slots = beside.slots if is_traced(beside.length) else int(beside.length)
    slot_key, slot_value = (x[:, 0, :slots].swapaxes(1, 2) for x in (beside.key, beside.value))  # [B, K, S, H]
    filled = jnp.arange(slots) < beside.length
    over_slots = jnp.where(filled, _dot_key(queries, slot_key) * scale, MASKED)  # [B, K, G, S]
    over_key, over_place = (_reduce_key, _reduce_place) if products == "reduce" else (_dot_key, _dot_place)
    visible = _visible(capacity, start, length)[:, None, None]
    over_cache = jnp.where(visible, over_key(queries, cached_key) * scale, MASKED)  # [B, K, G, C]
    logits = jnp.concatenate([over_cache, over_slots], axis=-1)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    over_cache, over_slots = jnp.split(weights.astype(query.dtype), [capacity], axis=-1)
    out = over_place(over_cache, cached_value) + _dot_place(over_slots, slot_value)
    return (out / total).reshape(query.shape).astype(query.dtype)


def _visible(capacity: int, start: Array | None, length: Array) -> Array:
    """[B or 1, C] bool: places that count."""
    place = jnp.arange(capacity, dtype=jnp.int32)[None]
    before_end = place < length
    return before_end if start is None else before_end & (place >= start[:, None])


def _attend_by_kernels(
    query: Array,
    cached_key: Array,
    cached_value: Array,
    start: Array | None,
    length: Array,
    beside: DepthStream,
    scale: float,
) -> Array:
    """`_attend` by the kernels: the sequence kernel over parts of the cache, the depth kernel over the slots."""
    batch, _, heads, head_dim = query.shape
    kv_heads = cached_key.shape[1]
    queries = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    parts, parts_lse = _attend_in_parts(queries, cached_key, cached_value, start, length, scale)
    if beside.slots == 1:  # the token alone: its value, whatever its logit is
        own = queries.astype(jnp.float32) * beside.key[:, 0, 0, :, None].astype(jnp.float32)
        slots_lse = scale * jnp.sum(own, axis=-1)  # [B, K, G]
        slots = jnp.broadcast_to(beside.value[:, 0, 0, :, None], queries.shape)
    else:
        slots, slots_lse = depth_attention(
            query, beside.key, beside.value,
            depth_length=beside.length, scale=scale, implementation="mosaic_gpu", return_lse=True,
        )  # fmt: skip
        slots, slots_lse = slots.reshape(queries.shape), slots_lse.reshape(queries.shape[:-1])
    lse = jnp.concatenate([parts_lse, slots_lse[:, :, None]], axis=2)  # [B, K, P + 1, G]
    weights = jax.nn.softmax(lse, axis=2)[..., None]
    out = jnp.sum(weights[:, :, :-1] * parts, axis=2) + weights[:, :, -1] * slots
    return out.reshape(query.shape).astype(query.dtype)


@functools.partial(jax.jit, static_argnames="scale")  # unrolled layers then share one kernel, compiled once
def _attend_in_parts(
    query: Array, cached_key: Array, cached_value: Array, start: Array | None, length: Array, scale: float
) -> tuple[Array, Array]:
    """Attention over the cache by the sequence kernel, in P parts of the places: (out, lse), each normalised by itself.

    A KV head's G queries stand as G tokens of one head; rows, KV heads and parts are the kernel's batch. All of it is
    reshapes: the cache is not copied.

    Args:
        query: [B, K, G, H].
        cached_key, cached_value: [B, K, C, H].
        start: [B] or None, length: scalar: the places from `start` up to `length` count.
        scale: of the logits.

    Returns:
        out [B, K, P, G, H] in the query's dtype, lse [B, K, P, G] float32, -inf where nothing is visible.
    """
    batch, kv_heads, group, head_dim = query.shape
    capacity = cached_key.shape[2]
    parts = _num_parts(batch * kv_heads, capacity)
    rows, places = batch * kv_heads * parts, capacity // parts
    queries = jnp.broadcast_to(query[:, :, None], (batch, kv_heads, parts, group, head_dim))
    key, value = (x.reshape(rows, places, 1, head_dim) for x in (cached_key, cached_value))
    if start is None:  # a length costs the kernel nothing, and it reads no more places than that
        filled = jnp.clip(length - jnp.arange(parts) * places, 0, places)
        filled = jnp.broadcast_to(filled, (batch, kv_heads, parts)).reshape(rows)
        mask = Mask(key_length=filled, finite_beyond=True)
    else:
        visible = _visible(capacity, start, length).reshape(batch, 1, parts, places)
        visible = jnp.broadcast_to(visible, (batch, kv_heads, parts, places)).reshape(rows, places)
        mask = Mask(
            query_segment_ids=jnp.ones((rows, group), jnp.int32), key_segment_ids=visible.astype(jnp.int32)
        )  # fmt: skip
    out, lse, _ = forward(
        Call(queries.reshape(rows, group, 1, head_dim), key, value, mask, scale=scale), implementation="mosaic_gpu"
    )
    return out.reshape(batch, kv_heads, parts, group, head_dim), lse.reshape(batch, kv_heads, parts, group)


def _num_parts(rows: int, capacity: int) -> int:
    """P, a divisor of the capacity: of those with parts not too small the first that fills the GPU, or the last."""
    fitting = [p for p in range(1, capacity + 1) if capacity % p == 0 and (p == 1 or capacity // p >= KERNEL_PLACES)]
    return next((p for p in fitting if rows * p >= KERNEL_CTAS), fitting[-1])


def _dot_key(query: Array, key: Array) -> Array:
    """[B, K, G, H] x [B, K, C, H] -> [B, K, G, C] float32."""
    return jnp.einsum(
        "bkgh,bkch->bkgc", query, key, precision=dot_precision(key.dtype), preferred_element_type=jnp.float32
    )


def _dot_place(weights: Array, value: Array) -> Array:
    """[B, K, G, C] x [B, K, C, H] -> [B, K, G, H] float32."""
    return jnp.einsum(
        "bkgc,bkch->bkgh", weights, value, precision=dot_precision(value.dtype), preferred_element_type=jnp.float32
    )


def _reduce_key(query: Array, key: Array) -> Array:
    """`_dot_key` as a fused product and sum."""
    products = query[:, :, :, None].astype(jnp.float32) * key[:, :, None].astype(jnp.float32)  # [B, K, G, C, H]
    return jnp.sum(products, axis=-1)


def _reduce_place(weights: Array, value: Array) -> Array:
    """`_dot_place` as a fused product and sum."""
    products = weights[..., None].astype(jnp.float32) * value[:, :, None].astype(jnp.float32)  # [B, K, G, C, H]
    return jnp.sum(products, axis=-2)


def _platform() -> str:
    """The platform whose defaults hold: another accelerator is taken for a GPU."""
    return "cpu" if jax.default_backend() == "cpu" else "gpu"


def _module(model: ModelFunction, params: PyTree) -> Transformer:
    """The model that holds `params`; of unrolled layers it holds the first, in the place of the stack."""
    if isinstance(params.get("layers"), tuple):
        params = params | {"layers": params["layers"][0]}
    return model.module(params)
