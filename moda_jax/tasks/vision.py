"""Vision: the class of an image.

Axes: B batch, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config import Config, TransformerConfig
from moda_jax.config_checks import require
from moda_jax.data.image_pipeline import ImageBatch, image_layout
from moda_jax.model.accounting import image_param_count, image_train_flops
from moda_jax.model.depth_probe import SlotChoice, depth_mass, filled_slots, probed_walk
from moda_jax.model.function import ModelFunction, abstract_module, split_module
from moda_jax.model.not_finite import counted_layers
from moda_jax.model.vision_transformer import VisionTransformer, check_image_model
from moda_jax.parallel.batches import RowShare
from moda_jax.quantities import quantity
from moda_jax.tasks.task import Metric, Objective, Task
from moda_jax.tasks.vision_data import VisionData
from moda_jax.vision_config import NORMALISATIONS

Array = jax.Array

_TOP = 5


class ImageSums(NamedTuple):
    """Sums over the rows of a batch that count, float32 scalars.

    Attributes:
        loss: the cross-entropy, in nats.
        num_targets: the rows.
        top1, top5: rows whose class has the highest logit, or one of the five highest; a tie counts against it.
    """

    loss: Array
    num_targets: Array
    top1: Array
    top5: Array


class VisionObjective(Objective):
    """-sum_c target_c log p_c + z_loss * log(Z)^2, summed over the images; in training with stochastic depth.

    Args:
        model: of a `VisionTransformer`.
        config: the run.
    """

    def __init__(self, model: ModelFunction, config: Config):
        self._model, self._config = model, config

    def weight(self, batch: ImageBatch) -> Array:
        """The number of images."""
        return jnp.sum(batch.row_mask)

    def loss(self, params: Any, batch: ImageBatch, z_loss: float) -> tuple[Array, ImageSums]:
        """The objective, summed over the images, and the sums that it is made of."""
        module = self._model.module(params)
        logits = module.logits(module.hidden(normalised(batch.images, self._config), batch.seeds))
        return image_loss(logits, batch, z_loss, self._config.data.images.label_smoothing)

    def evaluate(self, params: Any, batch: ImageBatch) -> ImageSums:
        """The sums without stochastic depth and label smoothing."""
        logits = self._model.module(params)(normalised(batch.images, self._config))
        return image_loss(logits, batch, 0.0, 0.0)[1]


class Vision(Task):
    """Classification: `model.*` is a `VisionTransformer`, `data.source` labelled images."""

    items: ClassVar[str] = "images"

    def __init__(self, config: Config):
        super().__init__(config)
        check_image_model(config.model)
        require(
            config.mesh.context == 1, "mesh.context", config.mesh.context,
            "1: an image's tokens are not split over devices",
        )  # fmt: skip
        image, kind = config.model.image, config.data.images.normalisation
        require(
            len(NORMALISATIONS[kind][0]) in (1, image.channels), "data.images.normalisation", kind,
            f"one for model.image.channels={image.channels}",
        )  # fmt: skip

    @functools.cached_property
    def model(self) -> ModelFunction:
        """Of a `VisionTransformer`."""
        return vision_function(self.config.model)

    @functools.cached_property
    def objective(self) -> VisionObjective:
        """Cross-entropy and z-loss."""
        return VisionObjective(self.model, self.config)

    @property
    def layout(self) -> ImageBatch:
        """Images and labels."""
        return image_layout(self.config.train.batch_size, self.config.model.image)

    def initial_params(self, key: Array) -> Any:
        """As `split_module`'s."""
        return split_module(VisionTransformer(self.config.model, rngs=nnx.Rngs(params=key)))[1]

    def adapted(self, params: Any) -> Any:
        """As they came."""
        expected = jax.eval_shape(self.initial_params, jax.random.key(0))
        if jax.tree.map(jnp.shape, expected) != jax.tree.map(jnp.shape, params):
            raise ValueError("params: names or shapes differ from those of the config's model")
        return jax.tree.map(jnp.asarray, params)

    def open_data(self, share: RowShare, directory: Path | None = None) -> VisionData:
        """Labelled images."""
        del directory
        return VisionData(self.config, share)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Loss, and the shares of images whose class is the likeliest, or one of the five likeliest."""
        return Metric("loss", "nats per image"), Metric("top1", "%", 2), Metric("top5", "%", 2)

    def values(self, means: Mapping[str, float]) -> dict[str, float]:
        """Shares as per cent."""
        return {"loss": means["loss"]} | {name: 100 * means[name] for name in ("top1", "top5") if name in means}

    @property
    def items_per_row(self) -> int:
        """A row is an image."""
        return 1

    @property
    def train_flops_per_item(self) -> float:
        """Of an image."""
        return image_train_flops(self.config.model)

    def description(self) -> list[tuple[str, str]]:
        """Model, image and attention."""
        model = self.config.model
        parameters, image = image_param_count(model), model.image
        return [
            ("model", f"{quantity(parameters)} parameters ({parameters}), {model.num_layers} layers, "
                      f"depth={model.depth}, compute dtype {model.dtype}"),
            ("image", f"{image.size} x {image.size} x {image.channels} in patches of {image.patch_size} x "
                      f"{image.patch_size}: {image.tokens} tokens, {image.pooling}, {image.positions} positions"),
            ("attention", model.attention_implementation or "the best implementation for this device"),
        ]  # fmt: skip

    def measures(self) -> dict[str, Callable[[Any, Any], Array]]:
        """Of a model with a depth stream: attention's mass on its slots over the batch's first micro-batch."""
        if not (self.config.eval.depth_mass and self.config.model.has_depth_probes):
            return {}

        def mass(params: Any, batch: ImageBatch) -> Array:
            rows = batch.images.shape[0] // self.config.train.accumulation_steps
            module = self.model.module(params)
            x = module.tokens(normalised(batch.images[:rows], self.config))
            choice = SlotChoice.of(filled_slots(module.config))
            return depth_mass(probed_walk(module, x, module.positions(x), None, choice)[1])

        return {"depth_mass": mass}

    def tensors(self, params: Any, batch: ImageBatch) -> Iterator[tuple[str, Array | tuple[int, int]]]:
        """Tokens, layers, final norm, logits and loss."""
        batch = jax.tree.map(jnp.asarray, batch)
        module = self.model.module(params)
        x = module.tokens(normalised(batch.images, self.config))
        yield "tokens of the patches", x
        hidden, counts, size = counted_layers(module, x, module.positions(x), None)
        for number, count in enumerate(counts):
            yield f"output of layer {number}", (int(count), size)
        yield "output of the final norm", hidden
        logits = module.logits(hidden)
        yield "logits", logits
        yield "loss", image_loss(logits, batch, 0.0, 0.0)[1].loss


@functools.cache
def vision_function(config: TransformerConfig) -> ModelFunction:
    """The function of a `VisionTransformer` alone; no parameter is allocated."""
    return abstract_module(lambda: VisionTransformer(config, rngs=nnx.Rngs(params=jax.random.key(0))))[0]


def normalised(images: Array, config: Config) -> Array:
    """Images uint8 [B, R, R, channels] as the model gets them, float32."""
    mean, deviation = (jnp.float32(jnp.array(part)) for part in NORMALISATIONS[config.data.images.normalisation])
    mean, deviation = (part.reshape(1, 1, 1, -1) for part in (mean, deviation))
    return (images.astype(jnp.float32) / 255.0 - mean) / deviation


def image_loss(logits: Array, batch: ImageBatch, z_loss: float, smoothing: float) -> tuple[Array, ImageSums]:
    """The objective of a batch, summed over its images.

    Args:
        logits: [B, C] float32.
        batch: labels [B, 2] with their shares, and which rows count.
        z_loss: weight of log(Z)^2.
        smoothing: share of a target that is spread evenly over all classes.

    Returns:
        The objective, float32, and its sums.
    """
    lse = jax.nn.logsumexp(logits, axis=-1)  # [B]
    chosen = jnp.take_along_axis(logits, batch.labels, axis=-1)  # [B, 2]
    loss = lse - (1.0 - smoothing) * jnp.sum(batch.label_shares * chosen, axis=-1)
    loss = loss - smoothing * jnp.mean(logits, axis=-1) if smoothing else loss
    first = chosen[:, :1]
    place = jnp.sum(~(logits < first), axis=-1)  # 1 for the highest; a logit that is not finite is never right
    total = functools.partial(_masked_sum, batch.row_mask)
    sums = ImageSums(total(loss), jnp.sum(batch.row_mask), total(place <= 1), total(place <= _TOP))
    return sums.loss + z_loss * total(lse**2), sums


def _masked_sum(mask: Array, values: Array) -> Array:
    return jnp.sum(jnp.where(mask > 0, values.astype(jnp.float32), 0.0))
