"""Decoding with a KV cache: the prompt at once, then one token per step.

What is kept over time is each layer's sequence keys and values, as in plain attention. The depth stream of a token is
read by that token alone, so in decoding it is the current token's, [B, 1, S, K, H]: filled anew by every step and never
cached. MoDA's cache is byte for byte as large as plain attention's. Where tokens read the slots of a whole chunk
(`DepthMechanism.softmax_chunk`) the streams of the last R tokens are kept too, R one less than the chunk.

Axes: L layers, B rows, C places of the cache, T tokens, S depth slots, R tokens whose slots are kept, N query heads, K
key/value heads, G = N / K, H head_dim, D width, V vocabulary. Rows are aligned at their ends: a short prompt begins at
place `start`, what stands before it is padding that nobody sees, and every row's next token goes to the same place. So
a step writes its keys and values with one update per array.

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

from moda_jax.config import TransformerConfig
from moda_jax.inference import token_attention
from moda_jax.inference.packed import PackedLayer, is_packable, packed_layers, packed_step, unpacked
from moda_jax.inference.sampling import SamplingConfig, sample
from moda_jax.model.depth.operations import SoftmaxAttention
from moda_jax.model.depth.registry import find_mechanism
from moda_jax.model.depth.stream import Stream
from moda_jax.model.function import ModelFunction, parameter_kinds
from moda_jax.model.stack import Step
from moda_jax.model.transformer import Transformer
from moda_jax.numerics.precision import compute_dtype
from moda_jax.parameter import cast_matrices
from pallas_kernels import dispatch
from pallas_kernels.parts import merge

Array = jax.Array
PyTree = Any

PREFILL_TOKENS = 2**15  # tokens of a group of rows that run through the prompt pass together: bounds its depth stream
# Whether the layers of a step are compiled one by one: no layer's weights or cache are then cut out of a stack. On an
# H100, 700M model with depth, one row: 3.6 ms a step, against 4.4 in a loop; see benchmarks/results.
DEFAULT_UNROLL = {"cpu": False, "gpu": True}
# Whether unrolled layers are packed where `packed.check_packed` allows it. On an H200, 700M model with depth: one row
# 0.98 ms a step, of 64 rows 4.9, against 3.5 and 5.3. Of GPUs only Hopper's: no other has run it.
DEFAULT_PACKED = {"cpu": False, "gpu": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Sequence keys and values of all layers.

    Attributes:
        key, value: [L, B, K, C, H]; or a tuple of L arrays [B, K, C, H], where the layers are unrolled.
        length: int32 scalar, places that are filled, in every row.
        start: [B] int32, a row's first place that is no padding; None: no row has any.
        slots: depth key and value [B, R, S, K, H] of the R tokens before the next, that of place p at p % R; None:
            nobody reads them.
    """

    key: Array | tuple[Array, ...]
    value: Array | tuple[Array, ...]
    length: Array
    start: Array | None
    slots: tuple[Array, Array] | None = None

    @classmethod
    def empty(cls, config: TransformerConfig, batch: int, capacity: int, start: Array | None) -> KVCache:
        """A cache of `capacity` places for each of `batch` rows, in the compute dtype."""
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
        zeros = jnp.zeros(shape, compute_dtype(config.dtype))
        start, slots = None if start is None else start.astype(jnp.int32), None
        mechanism = find_mechanism(config.depth)
        kept, count = mechanism.softmax_chunk(config) - 1, mechanism.slots(config)
        if kept and count:
            slots = (jnp.zeros((batch, kept, count, config.num_kv_heads, config.head_dim), zeros.dtype),) * 2
        return cls(zeros, zeros, jnp.int32(0), start, slots)

    @property
    def capacity(self) -> int:
        """C, the number of places."""
        return jax.tree.leaves(self.key)[0].shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, those of the slots too."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((self.key, self.value, self.slots)))


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
    return parameter_kinds(config).map(cast_matrices(compute_dtype(config.dtype)), params)


def decode_params(
    params: PyTree, config: TransformerConfig | None = None, *, unroll: bool | None = None, packed: bool | None = None
) -> PyTree:
    """Parameters as decoding reads them.

    Args:
        params: from `inference_params`.
        config: of the model; needed for packing.
        unroll: the layers as a tuple of separate arrays instead of one stack. A step then compiles every layer by
            itself. None: the device's default.
        packed: the unrolled layers' matrices side by side, see `moda_jax.inference.packed`. None: the device's default,
            for models that it serves.

    Raises:
        ValueError: packed without a config, or of a stack.
        NotImplementedError: packed, and the model is not served.
    """
    unroll = DEFAULT_UNROLL[_platform()] if unroll is None else unroll
    if packed is None:
        packed = unroll and config is not None and _packs() and is_packable(config)
    if packed:
        if config is None or not unroll:
            raise ValueError(f"packed=True: got config={config}, unroll={unroll}, expected a config and unroll=True")
        rest = {name: leaf for name, leaf in params.items() if name not in ("layers", "last_layer")}
        return rest | {"packed": packed_layers(params, config)}
    return params | {"layers": _unstacked(params["layers"])} if unroll and "layers" in params else params


@jax.jit
def _unstacked(layers: PyTree) -> tuple[PyTree, ...]:
    """A tree per layer from a tree of stacks."""
    count = len(jax.tree.leaves(layers)[0])
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(count))


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
    apart = "packed" in params or isinstance(params.get("layers"), tuple)
    if "packed" in params:
        # Cut out of what is packed before anything is multiplied: XLA would put the cuts together again, inside of
        # products whose tiles then do not fit into shared memory (2048 tokens of the 700M model on an H200).
        own = _own_parameters(params, params["packed"][0].config)
        params = jax.tree.map(jax.lax.optimization_barrier, own)
    module = _module(model, params)
    batch, T = tokens.shape
    rows = _group_rows(batch, T)
    cache = KVCache.empty(module.config, batch, capacity, start if padded else None)

    kept = 0 if cache.slots is None else cache.slots[0].shape[1]

    def group(i: Array, carry: tuple[Array, Array, Array, PyTree]) -> tuple[Array, Array, Array, PyTree]:
        hidden, key, value, slots = carry
        tokens_i, start_i = (jax.lax.dynamic_slice_in_dim(x, i * rows, rows) for x in (tokens, start))
        x, key_i, value_i, slots_i = _prompt_pass(module, params, tokens_i, start_i, padded, kept)
        place = (0, i * rows, 0, 0, 0)
        key, value = (jax.lax.dynamic_update_slice(a, b, place) for a, b in ((key, key_i), (value, value_i)))
        slots = jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), i * rows, 0), slots, slots_i
        )
        return jax.lax.dynamic_update_slice_in_dim(hidden, x, i * rows, 0), key, value, slots

    hidden = jnp.zeros((batch, 1, module.config.width), cache.key.dtype)
    carry = hidden, cache.key, cache.value, cache.slots
    hidden, key, value, slots = jax.lax.fori_loop(0, batch // rows, group, carry)
    if apart:
        key, value = tuple(key), tuple(value)
    return module.logits(hidden)[:, 0], KVCache(key, value, jnp.int32(T), cache.start, slots)


@functools.partial(jax.jit, static_argnames=("model", "implementation", "fused"), donate_argnames="cache")
def step(
    model: ModelFunction,
    params: PyTree,
    cache: KVCache,
    tokens: Array,
    *,
    implementation: str | None = None,
    fused: bool | None = None,
) -> tuple[Array, KVCache]:
    """One token of every row.

    Args:
        model, params: as in `prefill`.
        cache: of the tokens before; donated. It must have a free place.
        tokens: [B] int32.
        implementation: of attention over the cache, see `pallas_kernels.moda_attention`; None: the best for the device.
        fused: packed layers' attention over cache, slots and the token itself, from the raw projections on, as kernels
            for just that; False: by parts, as `implementation` has them. None: fused where a card has shown that to be
            faster (one row, see `pallas_kernels.token_attention`).

    Returns:
        Logits [B, V] float32 of the next token, and the cache with this one.

    Raises:
        ValueError: fused, and the layers are not packed.
        NotImplementedError: fused, and there are no such kernels for the model, the rows or the device.
    """
    return _step(_module(model, params), params, cache, tokens, implementation, fused)


@functools.partial(
    jax.jit,
    static_argnames=("model", "num_steps", "sampling", "vocab_size", "implementation", "fused"),
    donate_argnames="state",
)
def decode(
    model: ModelFunction,
    params: PyTree,
    state: DecodeState,
    *,
    num_steps: int,
    sampling: SamplingConfig,
    vocab_size: int,
    implementation: str | None = None,
    fused: bool | None = None,
) -> tuple[DecodeState, Array]:
    """`num_steps` tokens of every row, without a word to the host in between.

    Args:
        model, params: as in `prefill`.
        state: from `start` or from the call before; donated.
        num_steps: tokens; as many places of the cache must be free.
        sampling: how tokens are chosen.
        vocab_size: tokens 0..vocab_size-1 can be chosen: the tokenizer's vocabulary, which the model's may exceed.
        implementation, fused: as in `step`.

    Returns:
        The state, and the tokens [B, num_steps] int32, of which the first is the one that `state` held.
    """
    module = _module(model, params)

    def body(i: Array, carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, tokens = carry
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, state.token[:, None], i, axis=1)
        logits, cache = _step(module, params, state.cache, state.token, implementation, fused)
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


@dataclasses.dataclass(frozen=True)
class _Prompt(Step):
    """Leaves each layer's keys and values behind, as the softmax had them.

    Attributes:
        kept: R.
    """

    kept: int

    def attend(self, operation, request, stream, shared, number, held):
        _, key, value = request
        left = key.swapaxes(1, 2), value.swapaxes(1, 2)  # [B, K, T, H]
        return operation(request, stream, shared), left, stream, 0

    def keep(self, stream: Stream, held: PyTree) -> PyTree:
        """The slots of the last R tokens where the cache has them, or None."""
        return tuple(_last_kept(buffer, self.kept) for buffer in stream.buffers) if self.kept else held


def _last_kept(buffer: Array, kept: int) -> Array:
    """Of a buffer [B, T, S, K, H] the last R tokens, that of place p at p % R; 0 where there are fewer."""
    tokens = buffer.shape[1]
    last = buffer[:, -kept:]
    last = jnp.pad(last, ((0, 0), (kept - last.shape[1], 0), (0, 0), (0, 0), (0, 0)))
    return jnp.roll(last, tokens % kept, axis=1)


def _prompt_pass(
    module: Transformer, params: PyTree, tokens: Array, start: Array, padded: bool, kept: int
) -> tuple[Array, Array, Array, tuple[Array, Array] | None]:
    """tokens [B, T] to the last place's normed hidden state [B, 1, D], all layers' KV [L, B, K, T, H], and the slots of
    the last `kept` tokens."""
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.maximum(place - start[:, None], 0)  # [B, T]
    segment_ids = (place >= start[:, None]).astype(jnp.int32) if padded else None
    stacked = params.get("layers")
    if isinstance(stacked, tuple):  # one layer is compiled here all the same
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked)
    hidden, (key, value), slots = module.walk(
        module.embedding(tokens), positions, segment_ids, _Prompt(kept), layer_params=stacked, last_token_only=True
    )
    return hidden, key, value, slots


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
        implementation: of attention over the cache and over the slots.
    """

    start: Array | None
    length: Array
    implementation: str | None

    spare_slots = 1  # for the KV of the layer that runs
    numbered = True

    def attend(
        self,
        operation: SoftmaxAttention,
        request: tuple[Array, Array, Array],
        stream: Stream,
        shared: tuple,
        number: Array | int,
        held: tuple[tuple[PyTree, PyTree], tuple[Array, Array] | None],
    ) -> tuple[Array, tuple[Array, Array], Stream, int]:
        query, key, value = request
        own = key.swapaxes(1, 2), value.swapaxes(1, 2)  # [B, K, 1, H]
        held, slots = held
        cached = tuple(a[number] if isinstance(a, tuple) else _layer_of(a, number) for a in held)
        over_cache = token_attention.over_cache(query, cached, self.start, self.length, self.implementation)
        if not operation.reads_slots:
            attended = token_attention.merged(over_cache, token_attention.of_itself(query, key, value))
            return attended if operation.with_lse else attended[0], own, stream, 0
        exact = stream.key.dtype == key.dtype  # a slot takes the layer's own key and value as the softmax has them
        beside = stream.append(key, value) if exact else stream
        seen = dataclasses.replace(operation.slots(beside, own=int(exact)), chunk=1)
        if not exact:
            over_cache = merge(over_cache, token_attention.of_itself(query, key, value))
        if slots is not None:  # of the slots of the chunk's earlier tokens this layer sees as many as of its own
            earlier = dataclasses.replace(operation.slots(stream), key=slots[0], value=slots[1], chunk=1)
            seen_tokens = self._in_chunk(slots[0].shape[1], operation.chunk)
            over_cache = merge(over_cache, token_attention.over_chunk(query, earlier, seen_tokens, self.implementation))
        attended, _ = token_attention.merged(over_cache, token_attention.over_slots(query, seen, self.implementation))
        # The stream is read before it is written again: XLA would copy it otherwise, as in the layer loop.
        attended, beside = jax.lax.optimization_barrier((attended, beside))
        return attended, own, beside.with_length(stream.length), int(exact)

    def keep(self, stream: Stream, held: PyTree) -> PyTree:
        """And this token's slots [B, 1, S, K, H], where the cache has such."""
        cached, slots = held
        if slots is None:
            return cached, None, None
        return cached, slots, tuple(buffer[:, :, : slots[0].shape[2]] for buffer in stream.buffers)

    def _in_chunk(self, kept: int, chunk: int) -> Array:
        """[B or 1, R] bool: whether the kept tokens are of this token's chunk."""
        before = (self.length - 1 - jnp.arange(kept, dtype=jnp.int32)) % kept + 1  # so many tokens
        position = self.length - (jnp.zeros(1, jnp.int32) if self.start is None else self.start)
        return before[None] <= (position % chunk)[:, None]


def _layer_of(cached: Array, number: Array | int) -> Array:
    """One layer of a stacked cache: [B, K, C, H]."""
    return cached[number] if isinstance(number, int) else jax.lax.dynamic_index_in_dim(cached, number, keepdims=False)


def _step(
    module: Transformer,
    params: PyTree,
    cache: KVCache,
    tokens: Array,
    implementation: str | None,
    fused: bool | None = None,
) -> tuple[Array, KVCache]:
    if "packed" in params:
        return _packed_step(module, params["packed"], cache, tokens, implementation, fused)
    if fused:
        raise ValueError("fused=True: expected packed layers, see `decode_params`")
    begin = jnp.zeros(len(tokens), jnp.int32) if cache.start is None else cache.start
    positions = (cache.length - begin)[:, None]  # [B, 1]
    hidden, own, ((all_keys, all_values), kept, slots) = module.walk(
        module.embedding(tokens[:, None]), positions, None, _Token(cache.start, cache.length, implementation),
        held=((cache.key, cache.value), cache.slots), layer_params=params.get("layers"),
    )  # fmt: skip
    cache = dataclasses.replace(cache, key=all_keys, value=all_values, slots=kept)
    logits = module.logits(hidden)[:, 0]
    key, value = zip(*own, strict=True) if isinstance(cache.key, tuple) else own
    # Written after all was read.
    logits, key, value, slots = jax.lax.optimization_barrier((logits, key, value, slots))
    return logits, _write(cache, key, value, slots)


def _packed_step(
    module: Transformer,
    layers: tuple[PackedLayer, ...],
    cache: KVCache,
    tokens: Array,
    implementation: str | None,
    fused: bool | None,
) -> tuple[Array, KVCache]:
    x = module.embedding(tokens[:, None])[:, 0]
    hidden, own, cached = packed_step(
        layers, module.config, x, (cache.key, cache.value), cache.start, cache.length, implementation, fused
    )
    logits = module.logits(module.final_norm(hidden)[:, None])[:, 0]
    if own is None:
        return logits, KVCache(*cached, cache.length + 1, cache.start)
    logits, (key, value) = jax.lax.optimization_barrier((logits, own))  # written after all was read
    return logits, _write(cache, key, value, None)


def _write(cache: KVCache, key: PyTree, value: PyTree, slots: tuple[Array, Array] | None) -> KVCache:
    """The cache with one more place filled, from [..., B, K, 1, H], and one more token's slots [B, 1, S, K, H]."""

    def update(buffer: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, cache.length, axis=buffer.ndim - 2)

    if slots is not None:
        place = cache.length % cache.slots[0].shape[1]
        slots = jax.tree.map(
            lambda kept, new: jax.lax.dynamic_update_slice_in_dim(kept, new.astype(kept.dtype), place, axis=1),
            cache.slots, slots,
        )  # fmt: skip
    return KVCache(
        jax.tree.map(update, cache.key, key), jax.tree.map(update, cache.value, value), cache.length + 1, cache.start,
        slots,
    )  # fmt: skip


def _platform() -> str:
    """The platform whose defaults hold: another accelerator is taken for a GPU."""
    return "cpu" if jax.default_backend() == "cpu" else "gpu"


def _packs() -> bool:
    """Whether the default device packs layers by default."""
    platform = _platform()
    return DEFAULT_PACKED[platform] and (platform == "cpu" or "mosaic_gpu" in dispatch.preferred())


def _own_parameters(params: PyTree, config: TransformerConfig) -> PyTree:
    """The model's own, of `decode_params`: unrolled layers stay a tuple."""
    if "packed" not in params:
        return params
    return {name: leaf for name, leaf in params.items() if name != "packed"} | unpacked(params["packed"], config)


def _module(model: ModelFunction, params: PyTree) -> Transformer:
    """The model that holds `params`; of unrolled layers it holds the first, in the place of the stack."""
    if "packed" in params:
        params = _own_parameters(params, params["packed"][0].config)
    if isinstance(params.get("layers"), tuple):
        params = params | {"layers": params["layers"][0]}
    return model.module(params)
