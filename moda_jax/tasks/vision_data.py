"""The data of a run that learns to classify images."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from moda_jax.config import Config
from moda_jax.data.image_pipeline import ImageBatch, image_train_batches, image_validation_batches
from moda_jax.data.images import ImageSplit, open_images
from moda_jax.data.pipeline import TrainBatches
from moda_jax.parallel.batches import RowShare
from moda_jax.quantities import quantity

_logger = logging.getLogger(__name__)


class VisionData:
    """See `TaskData`. The constructor opens the images; nothing but what the cache holds of them is written.

    Args:
        config: the run.
        share: the rows of every batch that this process reads.

    Raises:
        ValueError: a mistake in config or data; the message names the field.

    Attributes:
        train_data, validation_data: the last one is None where `eval.interval_steps` is 0.
    """

    def __init__(self, config: Config, share: RowShare):
        self._config, self._share = config, share
        self.train_data = self._open("train")
        self.validation_data = self._open("validation") if config.eval.interval_steps > 0 else None
        known, classes = config.model.image.num_classes, len(self.train_data.classes)
        if classes > known:
            raise ValueError(
                f"model.image.num_classes={known}: expected at least the {classes} classes of data.source="
                f"{config.data.source!r}"
            )
        if classes < known:
            _logger.warning("model.image.num_classes=%d: the data has only %d of them", known, classes)

    def train_batches(self, position: int) -> TrainBatches:
        """This process's rows of the batches after global row `position`."""
        config, share = self._config, self._share
        return image_train_batches(
            self.train_data, config.data, config.model.image, batch_size=config.train.batch_size,
            seed=config.train.seed, position=position, process_index=share.index, process_count=share.count,
        )  # fmt: skip

    def validation_batches(self) -> Iterator[ImageBatch]:
        """This process's rows of the validation split, or of the `eval.num_batches` batches spread over it."""
        config, share = self._config, self._share
        return image_validation_batches(
            self.validation_data, config.data, config.model.image, batch_size=config.train.batch_size,
            num_batches=config.eval.num_batches, process_index=share.index, process_count=share.count,
        )  # fmt: skip

    def fingerprints(self) -> dict[str, str]:
        """Of the training images."""
        return {"dataset_fingerprint": self.train_data.fingerprint}

    @property
    def validation_fingerprint(self) -> str | None:
        """Of the validation split; None where it is not opened."""
        return None if self.validation_data is None else self.validation_data.fingerprint

    def accept_older(self, name: str, fingerprint: str) -> bool:
        """There was no earlier version."""
        del name, fingerprint
        return False

    def carried_files(self) -> Mapping[str, Path]:
        """None."""
        return {}

    def description(self) -> str:
        """Source and size."""
        classes = len(self.train_data.classes)
        return f"{self._config.data.source}: {quantity(self.num_items)} training images of {classes} classes"

    @property
    def num_items(self) -> int:
        """Training images."""
        return len(self.train_data)

    def _open(self, split: str) -> ImageSplit:
        return open_images(self._config.data, split, self._config.model.image.channels)
