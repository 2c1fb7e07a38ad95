"""Attention maps: where each head looks, over the sequence and over the depth slots (the paper's Figure 5).

The probabilities of one softmax over [sequence | depth], head by head, and per layer the mass on the depth slots, split
into the entries that attention sub-layers wrote and those of FFN sub-layers. A map of T = 4096 tokens has 17 million
cells per head: they are computed for a block of queries at a time and pooled at once, to at most PIXELS x PIXELS per
head: the mean over the queries of a pixel, the sum over its keys.

Axes: L layers, T tokens, R pixels of T, S depth slots, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.inference.decode import model_config
from moda_jax.model.attention import default_positions
from moda_jax.model.depth.registry import find_mechanism
from moda_jax.model.function import ModelFunction
from moda_jax.model.stack import Step
from moda_jax.numerics.precision import dot_precision
from moda_jax.pictures import (
    COLORS,
    PROBABILITY,
    UNFILLED,
    labelled,
    legend_below,
    log_probability,
    look,
    patch,
    picture,
    shade_unfilled,
)

Array = jax.Array

PIXELS = 256
BLOCK_QUERIES = 256  # queries whose probabilities stand in memory at once, [N, BLOCK_QUERIES, T + S] float32
MASKED = float(jnp.finfo(jnp.float32).min)  # a masked logit: no real one is below it
_LOWEST = 1e-4  # of the colour scale


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """Pooled probabilities and depth mass of all layers, on the host.

    Attributes:
        sequence: float32 [L, N, R, R], row: queries, column: keys.
        depth: float32 [L, N, R, S]; slots that a layer does not see are 0. Where a token sees those of others too, a
            slot's probability is the sum over them.
        slot_mass: float32 [L, N, S], mean over the tokens of the probability on each slot.
        entries_per_layer: slots that a layer writes: the first is the attention's, the second the FFN's.
        tokens: T.
    """

    sequence: np.ndarray
    depth: np.ndarray
    slot_mass: np.ndarray
    entries_per_layer: int
    tokens: int

    @property
    def attention_mass(self) -> np.ndarray:
        """[L]: mean over tokens and heads of the mass on attention entries."""
        return self._mass(0)

    @property
    def ffn_mass(self) -> np.ndarray:
        """[L]: the same on FFN entries."""
        return self._mass(1)

    def _mass(self, entry: int) -> np.ndarray:
        if entry >= self.entries_per_layer:
            return np.zeros(len(self.slot_mass), np.float32)
        return self.slot_mass[..., entry :: self.entries_per_layer].sum(axis=-1).mean(axis=-1)


def attention_maps(model: ModelFunction, params: Any, tokens: np.ndarray) -> AttentionMaps:
    """The maps of one text.

    Args:
        model: of a `Transformer`.
        params: from `decode.inference_params`.
        tokens: [T] int32, at most the model's context.

    Raises:
        ValueError: no token or too many.
    """
    config = model_config(model, params)
    if not 1 <= len(tokens) <= config.max_sequence_length:
        raise ValueError(
            f"tokens: got {len(tokens)}, expected 1..{config.max_sequence_length} (model.max_sequence_length)"
        )
    sequence, depth, slot_mass = _all_layers(model, params, np.asarray(tokens, np.int32)[None])
    mechanism = find_mechanism(config.depth)
    entries = len(mechanism.entry_sites(config)) if mechanism.softmax_slots(config) else 0
    return AttentionMaps(np.asarray(sequence), np.asarray(depth), np.asarray(slot_mass), entries, len(tokens))


class _Maps(Step):
    """Leaves each layer's pooled maps behind."""

    def attend(self, operation, request, stream, shared, number, held):
        query, key, _ = request
        chunk = operation.chunk if operation.reads_slots else 1
        if operation.reads_slots:
            depth_key, seen = stream.key[0].astype(key.dtype), operation.slots(stream).is_seen()
        else:
            depth_key, seen = jnp.zeros((key.shape[1], 0, *key.shape[2:]), key.dtype), jnp.zeros(0, bool)
        return operation(request, stream, shared), pooled_maps(query[0], key[0], depth_key, seen, chunk), stream, 0


@functools.partial(jax.jit, static_argnames="model")
def _all_layers(model: ModelFunction, params: Any, tokens: Array) -> tuple[Array, Array, Array]:
    """The model's forward pass over tokens [1, T], which leaves the pooled maps of every layer behind."""
    module = model.module(params)
    x = module.embedding(tokens)
    return module.walk(x, default_positions(x), None, _Maps())[1]


def pooled_maps(
    query: Array, key: Array, depth_key: Array, seen_slots: Array, chunk: int = 1
) -> tuple[Array, Array, Array]:
    """One layer's probabilities, pooled.

    Args:
        query: [T, N, H].
        key: [T, K, H].
        depth_key: [T, S, K, H].
        seen_slots: [S] bool, those that are part of the softmax.
        chunk: C: the slots of the earlier tokens of a query's chunk of C are too; a slot's mass is the sum over them.

    Returns:
        [N, R, R], [N, R, S] and [N, S], float32; see `AttentionMaps`.
    """
    T, heads, head_dim = query.shape
    slots, kv_heads = depth_key.shape[1:3]
    pool = -(-T // PIXELS)  # tokens per pixel
    pixels = -(-T // pool)
    rows = max(1, BLOCK_QUERIES // pool)  # pixel rows of a block
    blocks = -(-pixels // rows)
    padding = blocks * rows * pool - T
    query = jnp.pad(query.reshape(T, kv_heads, -1, head_dim), ((0, padding), (0, 0), (0, 0), (0, 0)))
    depth_key = jnp.pad(depth_key, ((chunk - 1, padding), (0, 0), (0, 0), (0, 0)))

    def dot(spec: str, a: Array, b: Array) -> Array:
        return jnp.einsum(spec, a, b, precision=dot_precision(a.dtype), preferred_element_type=jnp.float32)

    def block(i: Array) -> tuple[Array, Array, Array]:
        begin, count = i * rows * pool, rows * pool
        q = jax.lax.dynamic_slice_in_dim(query, begin, count)
        place = begin + jnp.arange(count)
        seen = jnp.arange(T) <= place[:, None]
        parts = [jnp.where(seen, dot("tkgh,ukh->kgtu", q, key) * head_dim**-0.5, MASKED)]
        for before in range(chunk):  # so many tokens
            d = jax.lax.dynamic_slice_in_dim(depth_key, begin + chunk - 1 - before, count)
            visible = seen_slots[None] & (place % chunk >= before)[:, None]
            parts.append(jnp.where(visible, dot("tkgh,tskh->kgts", q, d) * head_dim**-0.5, MASKED))
        logits = jnp.concatenate(parts, axis=-1).reshape(heads, count, T + chunk * slots)
        real = place < T  # the last block may go beyond the text
        probabilities = jax.nn.softmax(logits, axis=-1) * real[:, None]
        over_keys = probabilities[..., :T]
        over_slots = probabilities[..., T:].reshape(heads, count, chunk, slots).sum(axis=2)
        over_keys = jnp.pad(over_keys, ((0, 0), (0, 0), (0, pixels * pool - T)))
        per_row = jnp.maximum(real.reshape(rows, pool).sum(axis=1), 1)[:, None]
        over_keys = over_keys.reshape(heads, rows, pool, pixels, pool).sum(axis=(2, 4)) / per_row
        pooled_slots = over_slots.reshape(heads, rows, pool, slots).sum(axis=2) / per_row
        return over_keys, pooled_slots, over_slots.sum(axis=1) / T

    sequence, depth, mass = jax.lax.map(block, jnp.arange(blocks))  # [blocks, N, rows, ...]
    sequence, depth = (a.swapaxes(0, 1).reshape(heads, blocks * rows, -1)[:, :pixels] for a in (sequence, depth))
    return sequence, depth, mass.sum(axis=0)


def choose(count: int, most: int) -> list[int]:
    """At most `most` of 0..count-1, evenly spread, the first and the last among them: 0, 11, 23, 35 of 36."""
    return sorted({int(place) for place in np.linspace(0, count - 1, min(count, most))})


def draw(maps: AttentionMaps, path: Path, *, title: str, max_layers: int = 4, max_heads: int = 4) -> None:
    """Draws sampled layers (columns) by heads (rows), sequence | depth with a dashed line, and below the depth mass.

    Args:
        maps: from `attention_maps`.
        path: the PNG to write.
        title: of what run and text.
        max_layers, max_heads: how many are drawn, evenly spread.
    """
    num_layers, num_heads = maps.sequence.shape[:2]
    layers, heads = choose(num_layers, max_layers), choose(num_heads, max_heads)
    with picture(path, 1.6 + 2.5 * len(layers), 2.2 * len(heads) + 3.6) as figure:
        top, bottom = figure.subfigures(2, 1, height_ratios=[2.2 * len(heads) + 0.9, 2.7])
        grid = top.subplots(len(heads), len(layers), squeeze=False, sharey=True)
        for row, head in enumerate(heads):
            for column, layer in enumerate(layers):
                drawn = _draw_map(grid[row, column], maps, layer, head)
            grid[row, 0].set_ylabel(f"head {head}\nquery token")
        for axes, layer in zip(grid[0], layers, strict=True):
            axes.set_title(f"layer {layer}")
        top.colorbar(drawn, ax=grid, label="attention probability", shrink=0.6, pad=0.01)
        top.suptitle(f"Where each query looks, tokens | depth slots\n{title}")
        meanings = [patch("tokens after the query: masked", facecolor="white", edgecolor="black", linewidth=0.5)]
        if maps.depth.shape[-1]:
            meanings.append(patch("slots that no layer before has written", **UNFILLED))
        legend_below(top, meanings, columns=2)
        _draw_masses(bottom, maps)


def _draw_map(axes: Any, maps: AttentionMaps, layer: int, head: int) -> Any:
    """One head of one layer; returns what the colour bar needs."""
    image, boundary = _picture(maps, layer, head)
    drawn = axes.imshow(image, norm=log_probability(_LOWEST), cmap=PROBABILITY, aspect="auto", interpolation="nearest")
    axes.grid(visible=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
    pixels, width = len(image), image.shape[1]
    shown = choose(pixels, 4)
    tokens = [round(pixel * (maps.tokens - 1) / max(1, pixels - 1)) for pixel in shown]
    axes.set_yticks(shown, map(str, tokens))
    ends = [0, boundary - 1]
    if width > boundary:
        axes.axvline(boundary - 0.5, color=COLORS[5], linestyle="--", linewidth=1)
        slots = maps.depth.shape[-1]
        columns = (width - boundary) // slots
        filled = min(slots, layer * maps.entries_per_layer)
        shade_unfilled(axes, boundary + filled * columns - 0.5, width - 0.5)
        axes.set_xlabel(f"key token | slots 0..{slots - 1}", fontsize=8)
    else:
        axes.set_xlabel("key token", fontsize=8)
    axes.set_xticks(ends, ["0", str(maps.tokens - 1)])
    axes.tick_params(labelsize=7, length=2)
    return drawn


def _draw_masses(figure: Any, maps: AttentionMaps) -> None:
    """The mass on the depth slots by layer."""
    axes = figure.subplots()
    layer = np.arange(len(maps.sequence))
    curves = {"attention entries": maps.attention_mass, "FFN entries": maps.ffn_mass}
    for number, (name, mass) in enumerate(curves.items()):
        axes.plot(layer, mass, marker=look(number).marker, label=name, **look(number).curve)
    total = maps.attention_mass + maps.ffn_mass
    axes.plot(layer, total, color="black", linestyle=":", label="both")
    axes.set(
        title="Probability on the depth slots, mean over tokens and heads",
        xlabel="layer",
        ylabel="mass",
        ylim=(0, max(1e-3, 1.1 * total.max())),
        xticks=choose(len(layer), 13),
    )
    legend_below(figure, labelled(axes), columns=3)


def save_masses(maps: AttentionMaps, path: Path) -> None:
    """Writes the curve's numbers as JSON."""
    values = {
        "tokens": maps.tokens,
        "attention_entries": [round(float(mass), 6) for mass in maps.attention_mass],
        "ffn_entries": [round(float(mass), 6) for mass in maps.ffn_mass],
    }
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _picture(maps: AttentionMaps, layer: int, head: int) -> tuple[np.ndarray, int]:
    """[R, R + slots as wide columns]: not visible is white (NaN); and the column where depth begins."""
    sequence, depth = maps.sequence[layer, head], maps.depth[layer, head]
    pixels, slots = depth.shape
    image = np.where(np.tril(np.ones_like(sequence, bool)), sequence, np.nan)
    if slots:
        width = max(1, round(pixels / 3 / slots))
        filled = min(slots, layer * maps.entries_per_layer)
        depth = np.where(np.arange(slots) < filled, depth, np.nan)
        image = np.concatenate([image, np.repeat(depth, width, axis=1)], axis=1)
    return image, pixels
