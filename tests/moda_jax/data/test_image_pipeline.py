"""Batches of images: order, resume, shares of processes, resizing."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from moda_jax.config import DataConfig
from moda_jax.data.image_pipeline import (
    fit_image,
    image_layout,
    image_train_batches,
    image_validation_batches,
)
from moda_jax.data.images import ImageSplit
from moda_jax.vision_config import ImageDataSection, ImageModelSection

IMAGE = ImageModelSection(size=4, patch_size=2, channels=1, num_classes=10)
CONFIG = DataConfig(images=ImageDataSection(crop_fraction=1.0))
PIXELS = np.arange(10 * 16, dtype=np.uint8).reshape(10, 4, 4, 1)
IMAGES = ImageSplit("ten", np.arange(10, dtype=np.int32), tuple("0123456789"), "x", PIXELS.__getitem__)


def train(count=6, **fields):
    with image_train_batches(IMAGES, CONFIG, IMAGE, **{"batch_size": 4, "seed": 3} | fields) as batches:
        return list(itertools.islice(batches, count)), batches.position


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_epoch_has_every_image_once_with_its_label():
    (*batches,), position = train(5)
    labels = np.concatenate([batch.labels[:, 0] for batch in batches])
    assert position == 20 and sorted(labels[:10]) == sorted(labels[10:]) == list(range(10))
    assert labels[:10].tolist() != labels[10:].tolist()
    for batch in batches:
        np.testing.assert_array_equal(batch.images, PIXELS[batch.labels[:, 0]])
        np.testing.assert_array_equal(batch.label_shares, [[1, 0]] * 4)
    seeds = np.concatenate([batch.seeds for batch in batches])
    assert len(set(seeds.tolist())) == 20


def test_batches_are_laid_out_as_announced():
    layout = image_layout(4, IMAGE)
    for batch in (*train(1)[0], next(image_validation_batches(IMAGES, CONFIG, IMAGE, batch_size=4))):
        assert jax.tree.map(lambda a: (a.shape, a.dtype.name), batch) == jax.tree.map(
            lambda array: (array.shape, array.dtype), layout
        )


def test_batches_go_on_at_a_position():
    whole, _ = train(6)
    later, position = train(3, position=12)
    same(later, whole[3:])
    assert position == 24
    with pytest.raises(ValueError, match="position=-1: expected a number >= 0"):
        train(1, position=-1)


def test_processes_share_a_batch_in_blocks():
    whole, _ = train(4)
    parts = [train(4, process_index=i, process_count=2)[0] for i in range(2)]
    same([jax.tree.map(lambda *a: np.concatenate(a), *pair) for pair in zip(*parts, strict=True)], whole)
    with pytest.raises(ValueError, match="batch_size=4: expected a positive multiple of process_count=3"):
        train(1, process_count=3)


def test_the_order_is_the_seeds_and_may_be_that_of_the_source():
    assert train(2)[0][0].labels.tolist() != train(2, seed=4)[0][0].labels.tolist()
    plain = DataConfig(shuffle=False)
    with image_train_batches(IMAGES, plain, IMAGE, batch_size=4, seed=0) as batches:
        assert next(batches).labels[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.slow
def test_worker_processes_make_the_same_batches():
    config = DataConfig(images=ImageDataSection(workers=2))
    with image_train_batches(IMAGES, config, IMAGE, batch_size=4, seed=3) as batches:
        same(list(itertools.islice(batches, 6)), train(6)[0])


def test_validation_is_one_pass_and_its_last_batch_is_filled_up():
    batches = list(image_validation_batches(IMAGES, CONFIG, IMAGE, batch_size=4))
    assert [batch.row_mask.tolist() for batch in batches] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert np.concatenate([batch.labels[:, 0] for batch in batches])[:10].tolist() == list(range(10))
    few = list(image_validation_batches(IMAGES, CONFIG, IMAGE, batch_size=2, num_batches=2))
    assert np.concatenate([batch.labels[:, 0] for batch in few]).tolist() == [0, 2, 5, 7]  # spread over the split
    halves = [
        list(image_validation_batches(IMAGES, CONFIG, IMAGE, batch_size=4, process_index=i, process_count=2))
        for i in range(2)
    ]
    same([jax.tree.map(lambda *a: np.concatenate(a), *pair) for pair in zip(*halves, strict=True)], batches)


def test_an_image_is_fitted_by_its_middle():
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = PIXELS[:3, :, :, 0].transpose(1, 2, 0)
    np.testing.assert_array_equal(fit_image(wide, 4, 1.0), wide[:, 2:6])
    inner = fit_image(np.full((9, 7, 1), 5, np.uint8), 3, 0.5)
    assert inner.shape == (3, 3, 1) and (inner == 5).all()


RECIPE = ImageDataSection(
    normalisation="half",
    crop_scale=0.5,
    flip=True,
    rand_augment_magnitude=9,
    erase_probability=0.5,
    mixup_alpha=0.8,
    cutmix_alpha=1.0,
)


def recipe(count=4, **fields):
    fields = {"batch_size": 4, "seed": 3} | fields
    with image_train_batches(IMAGES, DataConfig(images=RECIPE), IMAGE, **fields) as batches:
        return list(itertools.islice(batches, count))


def test_augmented_batches_are_the_same_however_they_are_made():
    whole = recipe(6)
    same(recipe(6), whole)
    same(recipe(3, position=12), whole[3:])
    parts = [recipe(6, process_index=i, process_count=4) for i in range(4)]  # a row alone, its partner elsewhere
    same([jax.tree.map(lambda *a: np.concatenate(a), *four) for four in zip(*parts, strict=True)], whole)
    odd = recipe(8, batch_size=3)  # pairs straddle batches
    same(np.concatenate([batch.images for batch in odd]), np.concatenate([batch.images for batch in whole]))
    assert not np.array_equal(recipe(1, seed=4)[0].images, whole[0].images)


def test_neighbours_are_mixed_with_each_other_and_targets_follow():
    for batch in recipe(6):
        np.testing.assert_array_equal(batch.labels[0::2], batch.labels[1::2, ::-1])
        np.testing.assert_array_equal(batch.label_shares[0::2], batch.label_shares[1::2])
        np.testing.assert_allclose(batch.label_shares.sum(axis=1), 1.0, rtol=1e-6)
    assert len({float(share) for batch in recipe(6) for share in batch.label_shares[:, 0]}) > 6


def repeated(count=5, images=10, repeats=3, **fields):
    split = ImageSplit("some", IMAGES.labels[:images], IMAGES.classes, "x", PIXELS.__getitem__)
    config = DataConfig(images=ImageDataSection(crop_fraction=1.0, augmentation_repeats=repeats))
    with image_train_batches(split, config, IMAGE, **{"batch_size": 4, "seed": 3} | fields) as batches:
        return np.concatenate([batch.labels[:, 0] for batch in itertools.islice(batches, count)]).tolist()


def test_repeated_images_fill_an_epoch_of_the_same_length():
    """Of ten images in an epoch of ten rows: two three times, the next two twice."""
    plain, rows = repeated(repeats=1), repeated()
    for first in (0, 10):  # the rows of an epoch are those images that its order begins with
        a, b, c, d = plain[first : first + 4]
        assert rows[first : first + 10] == [a, b, a, b, a, b, c, d, c, d]


@pytest.mark.parametrize("images", range(1, 8))
def test_rows_of_repeated_images_are_of_the_epochs_images_whatever_their_number(images):
    rows = repeated(6, images)
    for first in range(0, 24 - images, images):
        epoch = rows[first : first + images]
        assert all(epoch.count(label) <= 3 for label in epoch)
        assert sum(epoch.count(label) == 1 for label in epoch) <= 2  # at most the last pair's are alone


def test_repeated_images_are_augmented_apart_and_mixed_with_another():
    section = dataclasses.replace(RECIPE, augmentation_repeats=3)

    def batches(count, **fields):
        fields = {"batch_size": 6, "seed": 3} | fields
        with image_train_batches(IMAGES, DataConfig(images=section), IMAGE, **fields) as found:
            return list(itertools.islice(found, count))

    whole = batches(5)
    for batch in whole:
        assert len({row.tobytes() for row in batch.images}) == 6
    labels, shares = (np.concatenate([getattr(batch, name) for batch in whole])[:10] for name in whole[0]._fields[1:3])
    mixed = shares[:, 1] > 0  # in the first epoch
    assert mixed.any() and (labels[mixed, 0] != labels[mixed, 1]).all()
    same(batches(2, position=18), whole[3:])
    parts = [batches(5, process_index=i, process_count=6) for i in range(6)]
    same([jax.tree.map(lambda *a: np.concatenate(a), *six) for six in zip(*parts, strict=True)], whole)
    odd = batches(6, batch_size=5)
    same(np.concatenate([batch.images for batch in odd]), np.concatenate([batch.images for batch in whole]))


def test_an_image_is_decoded_once_for_rows_beside_each_other():
    reads = []

    def read(index):
        reads.append(index)
        return PIXELS[index]

    split = dataclasses.replace(IMAGES, read=read)
    config = DataConfig(images=ImageDataSection(augmentation_repeats=3), prefetch_batches=1)
    with image_train_batches(split, config, IMAGE, batch_size=6, seed=3) as batches:
        next(batches)
    assert sorted(reads[:2]) == sorted(set(reads[:2])) and len(reads[:2]) == 2
    assert reads.count(reads[0]) == 1
