"""The vision transformer (arXiv 2010.11929): patches of an image as tokens, the trunk, and a head over classes.

The trunk is a language model's, with any depth mechanism; a depth entry belongs to one token, a patch or the class
token, so no mechanism needs an order of tokens.

Axes: B batch, T tokens, D model width, P numbers in a patch, C classes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moda_jax.config import TransformerConfig
from moda_jax.config_checks import require
from moda_jax.model.block import drop_rates
from moda_jax.model.initial_keys import InitialKeys
from moda_jax.model.layers import Projection, add_to_rows
from moda_jax.model.stack import Stack
from moda_jax.numerics.precision import compute_dtype
from moda_jax.parallel.manual import varying_like
from moda_jax.parallel.mesh import constrain
from moda_jax.parameter import parameter
from moda_jax.vision_config import ImageModelSection

Array = jax.Array

_WAVELENGTHS = 10000.0  # base of the fixed table's, as in the transformer's first paper


class VisionTransformer(Stack):
    """A classifier of images. `norm="pre", norm_kind="layer", ffn="gelu", biases=True` is DeiT (arXiv 2012.12877).

    Args:
        config: see `TransformerConfig`; its `image` section says how an image becomes tokens.
        rngs: source of the parameters.

    Raises:
        ValueError: a field that does not fit a model of images, named.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs | InitialKeys) -> None:
        check_image_model(config)
        dtype, keys, image = compute_dtype(config.dtype), InitialKeys.of(rngs), config.image
        super().__init__(config, rngs=keys)
        options = {"initializer_range": config.initializer_range, "bias": True}
        self.patches = Projection(
            "btp,pd->btd", (image.pixels, config.width), axes=(None, "width"), dtype=dtype, rngs=keys.at("patches"),
            **options,
        )  # fmt: skip
        self.class_token = (
            _learned(config, keys.at("class_token"), (config.width,), "channels")
            if image.pooling == "class_token" else None
        )  # fmt: skip
        self.position_table = (
            _learned(config, keys.at("position_table"), (image.tokens, config.width), None, "channels")
            if image.positions == "learned" else None
        )  # fmt: skip
        self.head = Projection(
            "bd,dc->bc", (config.width, image.num_classes), axes=("width", None), dtype=dtype, out_dtype=jnp.float32,
            rngs=keys.at("head"), **options,
        )  # fmt: skip

    def __call__(self, images: Array) -> Array:
        """Logits of the classes.

        Args:
            images: [B, size, size, channels], any float dtype, normalised as in training.

        Returns:
            [B, C] float32.

        Raises:
            ValueError: another shape, or integers.
        """
        return self.logits(self.hidden(images))

    def hidden(self, images: Array, seeds: Array | None = None) -> Array:
        """The final norm's output [B, T, D]: the class token first, where there is one, then the patches row by row.

        Args:
            images: as in `__call__`.
            seeds: [B] uint32, in training: what stochastic depth draws from for each image. None: nothing is left out.
        """
        x = self.tokens(images)
        config = self.config
        kept = None if seeds is None or not config.stochastic_depth else kept_outputs(config, seeds)
        return super().__call__(x, None, self.positions(x), kept)

    def tokens(self, images: Array) -> Array:
        """What the first layer gets, [B, T, D] in the compute dtype. Arguments as in `__call__`."""
        image = self.config.image
        expected = (image.size, image.size, image.channels)
        if images.ndim != 4 or images.shape[1:] != expected or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images: got shape {images.shape} and dtype {images.dtype}, expected floats [B, {image.size}, "
                f"{image.size}, {image.channels}]"
            )
        x = self.patches(cut_into_patches(images, image.patch_size))  # [B, T, D]
        if self.class_token is not None:
            first = add_to_rows(jnp.zeros_like(x[:, :1]), varying_like(self.class_token[...], x))
            x = jnp.concatenate([first, x], axis=1)
        if image.positions == "sincos":
            x = x + jnp.asarray(sincos_table(image, self.config.width), x.dtype)[None]
        elif self.position_table is not None:
            x = add_to_rows(x, varying_like(self.position_table[...], x))
        return constrain(x, "batch", "tokens", "channels")

    def positions(self, x: Array) -> Array:
        """Of tokens x [B, T, D]: row and column of each, int32 [B, T, 2], as the rotation takes them."""
        return jnp.broadcast_to(jnp.asarray(token_places(self.config.image)), (*x.shape[:2], 2))

    def logits(self, hidden: Array) -> Array:
        """hidden [B, T, D] to [B, C] float32."""
        with jax.named_scope("logits"):
            pooled = hidden[:, 0] if self.class_token is not None else _mean(hidden)
            return self.head(pooled)


def check_image_model(config: TransformerConfig) -> None:
    """Checks that a config is one of a model of images.

    Raises:
        ValueError: naming the field, what came and what was expected.
    """
    image = config.image
    require(not config.causal, "model.causal", config.causal, "False: every patch sees the whole image")
    if image.positions == "rotary":
        require(
            config.rope_theta is not None, "model.rope_theta", config.rope_theta,
            "a number with model.image.positions='rotary'",
        )  # fmt: skip
        require(
            config.head_dim % 4 == 0, "model.head_dim", config.head_dim,
            "a multiple of 4 with model.image.positions='rotary' (pairs for the row and for the column)",
        )  # fmt: skip
    else:
        require(
            config.rope_theta is None, "model.rope_theta", config.rope_theta,
            f"None with model.image.positions={image.positions!r}",
        )  # fmt: skip
    if image.positions == "sincos":
        require(
            config.width % 4 == 0, "model.width", config.width, "a multiple of 4 with model.image.positions='sincos'"
        )
    require(
        image.tokens <= config.max_sequence_length, "model.max_sequence_length", config.max_sequence_length,
        f"at least the {image.tokens} tokens of an image",
    )  # fmt: skip


def kept_outputs(config: TransformerConfig, seeds: Array) -> Array:
    """Which images keep the output of which layer's attention and FFN, [L, 2, B] bool, drawn from a seed for each."""

    def one(seed: Array) -> Array:
        return jax.random.uniform(jax.random.key(seed), (config.num_layers, 2))

    drawn = jax.vmap(one, out_axes=2)(seeds)  # [L, 2, B]
    return drawn >= drop_rates(config)[:, None, None]


def cut_into_patches(images: Array, size: int) -> Array:
    """[B, height, width, channels] to [B, T, P]: patches row by row, and in a patch pixels row by row."""
    B, height, width, channels = images.shape
    cut = images.reshape(B, height // size, size, width // size, size, channels)
    return cut.swapaxes(2, 3).reshape(B, -1, size * size * channels)


def token_places(image: ImageModelSection) -> np.ndarray:
    """Row and column of every token, int32 [T, 2], counted from 1; a class token stands at (0, 0)."""
    side = np.arange(1, image.grid + 1, dtype=np.int32)
    places = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2)
    return np.pad(places, ((image.tokens - len(places), 0), (0, 0)))


def sincos_table(image: ImageModelSection, width: int) -> np.ndarray:
    """The fixed table, float32 [T, D]: for the row and then for the column, counted from 0, the sines and the cosines
    of the place at D / 4 wavelengths; of a class token zeros."""
    quarter = width // 4
    frequencies = _WAVELENGTHS ** -(np.arange(quarter) / quarter)
    grid = token_places(image)[-(image.grid**2) :] - 1
    angles = grid[:, :, None] * frequencies  # [patches, 2, D / 4]
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(grid), width)
    return np.pad(table, ((image.tokens - len(grid), 0), (0, 0))).astype(np.float32)


def _learned(config: TransformerConfig, keys: InitialKeys, shape: tuple[int, ...], *axes: str | None) -> nnx.Param:
    """A vector or table beside the tokens, float32 and not decayed."""
    init = nnx.initializers.normal(config.initializer_range)
    return parameter(init(keys.params(), shape, jnp.float32), *axes)


def _mean(hidden: Array) -> Array:
    """Over the tokens, [B, D], summed in float32."""
    return jnp.mean(hidden.astype(jnp.float32), axis=1).astype(hidden.dtype)
