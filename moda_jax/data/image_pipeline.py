"""From labelled images to batches: order, resizing, prefetch, resume.

The rows of a run are counted over all epochs and processes. Row number n is a function of (images, seed, n) alone, and
a batch of size B holds the B rows from its position on, of which process p of P takes the p-th of P equal blocks: as
the rows of text are (`pipeline`).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from moda_jax.config import DataConfig
from moda_jax.data.augmentation import as_picture, as_pixels, augmented, draw_mixing, middle_box, resized
from moda_jax.data.images import ImageSplit
from moda_jax.data.pipeline import TrainBatches, order_seed, read_ahead, share_of_batch
from moda_jax.parallel.batches import ArrayLayout
from moda_jax.vision_config import ImageDataSection, ImageModelSection

_BESIDE = 2  # images whose rows take turns, where every image has several
_OF_A_ROW, _OF_A_PAIR, _OF_THE_MODEL = 1, 2, 3  # what a random number is for


class ImageBatch(NamedTuple):
    """B labelled images of R x R pixels.

    Attributes:
        images: uint8 [B, R, R, channels].
        labels: int32 [B, 2], two classes: those of a mixed image, else twice the same.
        label_shares: float32 [B, 2], how much each of them counts; the sum is 1.
        row_mask: float32 [B], 1, or 0 for a row that fills up the last batch of an evaluation.
        seeds: uint32 [B], for what is random in the model: a number of the row's own.
    """

    images: np.ndarray
    labels: np.ndarray
    label_shares: np.ndarray
    row_mask: np.ndarray
    seeds: np.ndarray


def image_layout(batch_size: int, image: ImageModelSection) -> ImageBatch:
    """The `ArrayLayout` of every array of a global batch."""
    pixels = (batch_size, image.size, image.size, image.channels)
    return ImageBatch(
        ArrayLayout(pixels, "uint8", ("batch", None, None, None)),
        ArrayLayout((batch_size, 2), "int32", ("batch", None)),
        ArrayLayout((batch_size, 2), "float32", ("batch", None)),
        ArrayLayout((batch_size,), "float32", ("batch",)),
        ArrayLayout((batch_size,), "uint32", ("batch",)),
    )


def image_train_batches(
    images: ImageSplit,
    config: DataConfig,
    image: ImageModelSection,
    *,
    batch_size: int,
    seed: int,
    position: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """Endless training batches; every epoch has every image once, or with `data.images.augmentation_repeats` a part
    of them as often (see `_Repeats`). Arguments, result and errors as of `train_batches`."""
    rows_here = share_of_batch(batch_size, process_index, process_count)
    for name, value in (("seed", seed), ("position", position)):
        if value < 0:
            raise ValueError(f"{name}={value}: expected a number >= 0")
    order = grain.MapDataset.range(len(images))
    if config.shuffle:
        order = order.shuffle(seed=order_seed(seed))
    order = order.repeat()
    repeats = config.images.augmentation_repeats
    if repeats > 1:
        order = grain.MapDataset.range(sys.maxsize).map(_Repeats(order, len(images), repeats))
    make = _TrainRows(images, config.images, image.size, order, order_seed(seed), position, batch_size, rows_here)
    batches = order[position:].batch(batch_size, drop_remainder=True, batch_fn=np.asarray).map_with_index(make)
    return TrainBatches(
        batches, batch_size, position, config.prefetch_batches, threads=config.images.threads,
        workers=config.images.workers,
    )  # fmt: skip


def image_validation_batches(
    images: ImageSplit,
    config: DataConfig,
    image: ImageModelSection,
    *,
    batch_size: int,
    num_batches: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[ImageBatch]:
    """One pass over the images in order, all or evenly spread. Arguments and result as of `validation_batches`."""
    rows_here = share_of_batch(batch_size, process_index, process_count)
    count = min(len(images), num_batches * batch_size) if num_batches else len(images)

    def make(places: np.ndarray) -> ImageBatch:
        chosen = (places * len(images) // count)[rows_here]
        pixels = [fit_image(images.read(int(i)), image.size, config.images.crop_fraction) for i in chosen]
        missing = batch_size // process_count - len(chosen)
        shape = (missing, image.size, image.size, image.channels)
        labels = np.pad(images.labels[chosen], (0, missing))
        return ImageBatch(
            images=np.concatenate([np.array(pixels, np.uint8).reshape(-1, *shape[1:]), np.zeros(shape, np.uint8)]),
            labels=np.stack([labels, labels], axis=1).astype(np.int32),
            label_shares=np.tile(np.float32([1, 0]), (len(labels), 1)),
            row_mask=(np.arange(len(labels)) < len(chosen)).astype(np.float32),
            seeds=np.zeros(len(labels), np.uint32),
        )

    batches = grain.MapDataset.range(count).batch(batch_size, drop_remainder=False, batch_fn=np.asarray).map(make)

    def run() -> Iterator[ImageBatch]:
        iterator = read_ahead(batches, config.prefetch_batches, threads=config.images.threads)
        try:
            yield from iterator
        finally:
            iterator.close()

    return run()


def fit_image(pixels: np.ndarray, size: int, crop_fraction: float) -> np.ndarray:
    """The middle of an image, resized: uint8 [height, width, channels] to [size, size, channels].

    Args:
        pixels: the image.
        size: of the result.
        crop_fraction: the shorter side is resized to `size` / `crop_fraction` first.
    """
    image = as_picture(pixels)
    return as_pixels(resized(image, size, middle_box(image.width, image.height, crop_fraction)))


@dataclasses.dataclass(frozen=True)
class _Repeats:
    """Repeated augmentation (arXiv 1902.05509): row of the run -> number of its image.

    Of the epoch's order a, b, c, d, ... the rows are, repeated three times, a b a b a b c d c d c d ..., as many as
    there are images: a third of them, drawn anew in every epoch. Two take turns because neighbours are mixed with each
    other.

    Attributes:
        order: row of a run without repeats -> number of its image.
        epoch: its images.
        repeats: rows of an image.
    """

    order: Sequence[int]
    epoch: int
    repeats: int

    def __call__(self, row: int) -> int:
        epoch, place = divmod(row, self.epoch)
        group, inside = divmod(place, _BESIDE * self.repeats)
        return int(self.order[epoch * self.epoch + group * _BESIDE + inside % _BESIDE])


@dataclasses.dataclass(frozen=True)
class _TrainRows:
    """Makes this process's rows of a batch from its number and the images of all of its rows.

    Rows 2 k and 2 k + 1 of a run are mixed with each other, wherever they are made.

    Attributes:
        images, section, size: what is read, and what is done to it.
        order: row of the run -> number of its image.
        seed: of all that is random.
        position, batch_size: of the first batch's first row, and rows in a batch.
        rows_here: of a batch, this process's.
    """

    images: ImageSplit
    section: ImageDataSection
    size: int
    order: Sequence[int]
    seed: int
    position: int
    batch_size: int
    rows_here: slice

    def __call__(self, number: int, chosen: np.ndarray) -> ImageBatch:
        first = self.position + number * self.batch_size
        rows = range(first, first + self.batch_size)[self.rows_here]
        known = {first + i: int(image) for i, image in enumerate(chosen)}
        made: dict[int, tuple[np.ndarray, int]] = {}
        read = functools.lru_cache(maxsize=_BESIDE)(self.images.read)

        def make(row: int) -> tuple[np.ndarray, int]:
            """One row's image and label before it is mixed."""
            if row not in made:
                image = known[row] if row in known else int(self.order[row])
                pixels = augmented(read(image), self.size, self.section, self._random(row, _OF_A_ROW))
                made[row] = pixels, int(self.images.labels[image])
            return made[row]

        pixels, labels, shares = [], [], []
        for row in rows:
            (own, label), other_label, share = make(row), None, 1.0
            mixing = draw_mixing(self.size, self.section, self._random(row // 2, _OF_A_PAIR))
            if mixing is not None:
                other, other_label = make(row ^ 1)
                own, share = mixing(own, other), mixing.share
            pixels.append(own)
            labels.append((label, label if other_label is None else other_label))
            shares.append((share, 1.0 - share))
        return ImageBatch(
            images=np.stack(pixels),
            labels=np.array(labels, np.int32),
            label_shares=np.array(shares, np.float32),
            row_mask=np.ones(len(rows), np.float32),
            seeds=np.array([self._random(row, _OF_THE_MODEL).integers(2**32) for row in rows], np.uint32),
        )

    def _random(self, number: int, use: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, number, use))
