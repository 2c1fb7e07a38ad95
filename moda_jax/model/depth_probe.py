"""The model's forward pass with a hand on the depth slots: which of them each layer reads, and what mass they get.

A layer reads any choice of the slots that are filled when its turn comes. The chosen slots are gathered and the op
runs over them alone, so what is hidden takes no part in the softmax, exactly as if it had never been written. The
choice is an argument of the compiled function: one compilation serves every choice.

Axes: B batch, T tokens, L layers, S depth slots, D model width, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.config import TransformerConfig
from moda_jax.model.attention import default_positions
from moda_jax.model.stack import Stack, Step
from moda_jax.model.transformer import Transformer
from moda_jax.numerics.precision import dot_precision
from moda_jax.parallel.attention import attention_forward
from pallas_kernels.operands import DepthKV

Array = jax.Array


class SlotChoice(NamedTuple):
    """The slots that each layer reads: `order[l, :count[l]]` in layer l.

    Attributes:
        order: int32 [L, S], in every row a permutation of the slots.
        count: int32 [L].
    """

    order: Array | np.ndarray
    count: Array | np.ndarray

    @classmethod
    def of(cls, visible: np.ndarray) -> SlotChoice:
        """From visible [L, S] bool; a slot that is not filled when layer l reads must be False in row l."""
        order = np.argsort(~visible, axis=1, kind="stable")
        return cls(order.astype(np.int32), visible.sum(axis=1).astype(np.int32))


def filled_slots(config: TransformerConfig) -> np.ndarray:
    """bool [L, S]: the slots that are filled when layer l reads, which is what it reads in the model."""
    layer, slot = np.arange(config.num_layers)[:, None], np.arange(config.depth_slots)
    return slot < layer * config.depth_entries_per_layer


def slot_writers(config: TransformerConfig) -> tuple[np.ndarray, np.ndarray]:
    """Of every slot, int [S]: the layer that writes it, and which of that layer's entries it is (0: attention's)."""
    slot = np.arange(config.depth_slots)
    entries = max(1, config.depth_entries_per_layer)
    return slot // entries, slot % entries


def check_has_depth(config: TransformerConfig) -> None:
    """Raises ValueError for a model without a slot to read."""
    if config.depth_slots == 0:
        raise ValueError(
            f"model.depth={config.depth!r} with model.num_layers={config.num_layers}: there is no depth slot to "
            "probe; expected a model with a depth stream and at least 2 layers"
        )


def probed_hidden(
    module: Transformer,
    tokens: Array,
    segment_ids: Array | None,
    positions: Array | None,
    choice: SlotChoice,
) -> tuple[Array, Array]:
    """`Transformer.hidden` with every layer reading the chosen slots, and the probability on every slot.

    Args:
        module: a model with a depth stream that is read by the attention op.
        tokens: [B, T] int32.
        segment_ids, positions: [B, T] int32 or None, as in `Transformer.__call__`.
        choice: the slots.

    Returns:
        The final norm's output [B, T, D], and float32 [L, S]: the mean over tokens and heads of a slot's probability.

    Raises:
        ValueError: a model without depth slots.
        NotImplementedError: its mechanism reads the stream elsewhere than in the attention op.
    """
    check_has_depth(module.config)
    if not module.config.has_depth_probes:
        raise NotImplementedError(
            "depth probes: the model reads its slots outside of attention's softmax, or not all of its token's alone "
            f"({module.config.moda})"
        )
    x = module.embedding(tokens)  # [B, T, D]
    return probed_walk(module, x, default_positions(x) if positions is None else positions, segment_ids, choice)


def probed_walk(
    module: Stack, x: Array, positions: Array, segment_ids: Array | None, choice: SlotChoice
) -> tuple[Array, Array]:
    """`probed_hidden` from the embedded tokens x [B, T, D] on, for any model whose mechanism has probes."""
    held = tuple(jnp.asarray(array, jnp.int32) for array in choice)
    hidden, masses, _ = module.walk(x, positions, segment_ids, _Probe(), held=held)
    return hidden, masses


def depth_mass(slot_mass: Array) -> Array:
    """From `probed_hidden`'s masses [L, S]: the mass on the depth part, mean over the layers that can see a slot."""
    return jnp.sum(slot_mass[1:], axis=-1).mean()


class _Probe(Step):
    """Attention over the chosen slots alone; leaves the probability on every slot [S] behind."""

    numbered = True

    def attend(self, operation, request, stream, shared, number, held):
        query, _, _ = request
        order, count = (jax.lax.dynamic_index_in_dim(array, number, keepdims=False) for array in held)
        depth_key, depth_value = (jnp.take(array, order, axis=2) for array in stream.buffers)
        depth = DepthKV(depth_key, depth_value, length=count)
        call = dataclasses.replace(operation.call(request, stream, shared), depth=depth)
        attended, lse, _ = attention_forward(call, implementation=operation.implementation)
        mass = _mass(query, depth_key, lse, count, call.scale)
        return attended, jnp.zeros_like(mass).at[order].set(mass), stream, 0


def _mass(query: Array, depth_key: Array, lse: Array, count: Array, scale: float) -> Array:
    """exp(logit - lse) of each slot [S], its mean over rows, tokens and heads; lse [B, T, N] is that of the softmax."""
    B, T, S, K, H = depth_key.shape
    grouped = query.reshape(B, T, K, -1, H)
    logits = jnp.einsum(
        "btkgh,btskh->btkgs", grouped, depth_key.astype(query.dtype),
        precision=dot_precision(query.dtype), preferred_element_type=jnp.float32,
    )  # fmt: skip
    probability = jnp.exp(logits * scale - lse.reshape(B, T, K, -1)[..., None])
    return jnp.where(jnp.arange(S) < count, probability.mean(axis=(0, 1, 2, 3)), 0.0)
