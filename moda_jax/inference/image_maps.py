"""Attention maps over an image: where each head of the class token looks, over the patches and over the depth slots.

The probabilities of one softmax over [patches | depth] for the query that the head of the model reads: the class
token's, or the mean over all patches where the model pools them.

Axes: L layers, N query heads, R patches along a side, T tokens, S depth slots, K key/value heads, H head_dim.
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

from moda_jax.inference.attention_maps import MASKED, choose
from moda_jax.model.depth.registry import find_mechanism
from moda_jax.model.function import ModelFunction
from moda_jax.model.stack import Step
from moda_jax.numerics.precision import dot_precision
from moda_jax.pictures import PROBABILITY, UNFILLED, legend_below, log_probability, patch, picture, shade_unfilled

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ImageMaps:
    """Probabilities of all layers for one image, on the host. The three sum to 1.

    Attributes:
        patches: float32 [L, N, R, R].
        class_token: float32 [L, N], on the class token itself; 0 in a model without.
        depth: float32 [L, N, S]; slots that a layer does not see are 0.
        entries_per_layer: slots that a layer writes: the first is the attention's, the second the FFN's.
    """

    patches: np.ndarray
    class_token: np.ndarray
    depth: np.ndarray
    entries_per_layer: int

    @property
    def depth_mass(self) -> np.ndarray:
        """[L]: mean over the heads of the mass on the depth slots."""
        return self.depth.sum(axis=-1).mean(axis=-1)


def image_maps(model: ModelFunction, params: Any, image: np.ndarray) -> ImageMaps:
    """The maps of one image.

    Args:
        model: of a `VisionTransformer`.
        params: its parameters.
        image: [size, size, channels] float32, normalised as in training.
    """
    sequence, depth = (np.asarray(part) for part in _all_layers(model, params, jnp.asarray(image)[None]))
    config = model.module(params).config
    grid = config.image.grid
    patches = sequence[..., -(grid**2) :].reshape(*sequence.shape[:2], grid, grid)
    first = sequence[..., 0] if config.image.pooling == "class_token" else np.zeros_like(sequence[..., 0])
    mechanism = find_mechanism(config.depth)
    entries = len(mechanism.entry_sites(config)) if mechanism.softmax_slots(config) else 0
    return ImageMaps(patches, first, depth, entries)


@dataclasses.dataclass(frozen=True)
class _Maps(Step):
    """Leaves each layer's probabilities behind, [N, T] and [N, S]: of the first query, or the mean over all."""

    first_only: bool

    def attend(self, operation, request, stream, shared, number, held):
        query, key, _ = request
        if operation.reads_slots:
            depth_key, seen = stream.key[0].astype(key.dtype), operation.slots(stream).is_seen()
        else:
            depth_key, seen = jnp.zeros((key.shape[1], 0, *key.shape[2:]), key.dtype), jnp.zeros(0, bool)
        asked = query[0, :1] if self.first_only else query[0]
        left = _probabilities(asked, key[0], depth_key[: len(asked)], seen)
        return operation(request, stream, shared), left, stream, 0


def _probabilities(query: Array, key: Array, depth_key: Array, seen: Array) -> tuple[Array, Array]:
    """query [Q, N, H], key [T, K, H], depth_key [Q, S, K, H]: the means over the queries, [N, T] and [N, S] float32."""
    count, heads, head_dim = query.shape
    grouped = query.reshape(count, key.shape[1], -1, head_dim)  # [Q, K, G, H]
    options = {"precision": dot_precision(query.dtype), "preferred_element_type": jnp.float32}
    over_keys = jnp.einsum("qkgh,ukh->kgqu", grouped, key, **options)
    over_slots = jnp.einsum("qkgh,qskh->kgqs", grouped, depth_key, **options)
    logits = jnp.concatenate([over_keys, jnp.where(seen, over_slots, MASKED)], axis=-1) * head_dim**-0.5
    both = jax.nn.softmax(logits, axis=-1).mean(axis=2).reshape(heads, -1)
    return both[:, : len(key)], both[:, len(key) :]


@functools.partial(jax.jit, static_argnames="model")
def _all_layers(model: ModelFunction, params: Any, images: Array) -> tuple[Array, Array]:
    """[L, N, T] and [L, N, S]."""
    module = model.module(params)
    x = module.tokens(images)
    step = _Maps(module.config.image.pooling == "class_token")
    return module.walk(x, module.positions(x), None, step)[1]


def draw_image_maps(
    maps: ImageMaps, image: np.ndarray, path: Path, *, title: str, max_layers: int = 4, max_heads: int = 4
) -> None:
    """Draws the image, and for sampled layers (columns) and heads (rows) a map: patches | depth slots, the oldest slot
    at the top.

    Args:
        maps: from `image_maps`.
        image: uint8 [height, width, channels].
        path: the PNG to write.
        title: of what run and image.
        max_layers, max_heads: how many are drawn, evenly spread.
    """
    num_layers, num_heads = maps.patches.shape[:2]
    layers, heads = choose(num_layers, max_layers), choose(num_heads, max_heads)
    with picture(path, 2.3 * (1 + len(layers)) + 1.2, 2.3 * len(heads) + 1.3) as figure:
        grid = figure.subplots(len(heads), 1 + len(layers), squeeze=False)
        for row, head in enumerate(heads):
            grey = image.shape[-1] == 1
            grid[row, 0].imshow(image[..., 0] if grey else image, cmap="gray" if grey else None)
            grid[row, 0].set_ylabel(f"head {head}")
            for column, layer in enumerate(layers, start=1):
                axes = grid[row, column]
                shown = map_picture(maps, layer, head)
                drawn = axes.imshow(shown, norm=log_probability(1e-4), cmap=PROBABILITY, interpolation="nearest")
                if maps.depth.shape[-1] and not layer * maps.entries_per_layer:
                    shade_unfilled(axes, len(shown) + 0.5, shown.shape[1] - 0.5)
                axes.set_xlabel(f"on the slots: {maps.depth[layer, head].sum():.2f}", fontsize=8)
        grid[0, 0].set_title("image")
        for axes, layer in zip(grid[0, 1:], layers, strict=True):
            axes.set_title(f"layer {layer}")
        for axes in grid.flat:
            axes.grid(visible=False)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        figure.colorbar(drawn, ax=grid, label="attention probability", shrink=0.6, pad=0.01)
        figure.suptitle(f"Where the image's query looks, patches | depth slots\n{title}")
        if maps.depth.shape[-1]:
            legend_below(figure, [patch("no slot is written yet", **UNFILLED)], columns=1)


def map_picture(maps: ImageMaps, layer: int, head: int) -> np.ndarray:
    """One map as numbers: the patches, a white column, and the filled slots one below the other; NaN is white.

    Returns:
        float32 [height, width]: every patch and slot as a block of equal numbers.
    """
    patches, grid = maps.patches[layer, head], maps.patches.shape[-1]
    filled = min(maps.depth.shape[-1], layer * maps.entries_per_layer)
    scale = max(1, -(-filled // grid))  # a slot is at least a row high
    image = np.kron(patches, np.ones((scale, scale), np.float32))
    if not maps.depth.shape[-1]:
        return image
    strip = np.full((grid * scale, max(2, grid * scale // 6)), np.nan, np.float32)
    for slot, rows in enumerate(np.array_split(np.arange(grid * scale), filled) if filled else []):
        strip[rows, 1:] = maps.depth[layer, head, slot]
    return np.concatenate([image, strip], axis=1)


def save_image_masses(maps: ImageMaps, path: Path) -> None:
    """Writes the masses by layer as JSON."""
    values = {
        "depth_mass": [round(float(mass), 6) for mass in maps.depth_mass],
        "class_token_mass": [round(float(mass), 6) for mass in maps.class_token.mean(axis=-1)],
    }
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
