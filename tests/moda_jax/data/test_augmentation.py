"""Random changes of training images."""

import dataclasses

import numpy as np
import pytest

from moda_jax.data.augmentation import (
    OPERATIONS,
    Mixing,
    as_picture,
    as_pixels,
    augmented,
    crop_box,
    draw_mixing,
    erased,
    rand_augment,
)
from moda_jax.vision_config import ImageDataSection

PLAIN = ImageDataSection()


def random(seed=0):
    return np.random.default_rng(seed)


def picture(channels=3, size=16):
    return random(1).integers(0, 256, (size, size, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_without_any_change_an_image_passes_as_it_is(channels):
    np.testing.assert_array_equal(augmented(picture(channels), 16, PLAIN, random()), picture(channels))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_operation_gives_an_image_of_the_same_kind(name, channels):
    image = as_picture(picture(channels))
    strong = as_pixels(OPERATIONS[name](image, 1.0, -1.0))
    assert strong.shape == (16, 16, channels) and strong.dtype == np.uint8
    if name not in ("autocontrast", "equalize", "invert", "posterize"):  # which are never nothing
        np.testing.assert_array_equal(as_pixels(OPERATIONS[name](image, 0.0, 1.0)), as_pixels(image))
    if not (name in ("color", "autocontrast", "equalize") and channels == 1):  # grey noise has none of it to change
        assert not np.array_equal(strong, as_pixels(image))


def test_what_operations_do_to_values():
    image = as_picture(np.arange(256, dtype=np.uint8).reshape(16, 16, 1))
    values = np.arange(256)
    for name, level, expected in (
        ("invert", 1.0, 255 - values),
        ("solarize", 0.5, np.where(values >= 128, 255 - values, values)),
        ("solarize_add", 1.0, np.where(values < 128, np.minimum(255, values + 110), values)),
        ("posterize", 0.5, values & 0b11000000),
    ):
        np.testing.assert_array_equal(as_pixels(OPERATIONS[name](image, level, 1.0)).reshape(-1), expected, name)


def test_rand_augment_leaves_some_images_and_changes_others():
    section = dataclasses.replace(PLAIN, rand_augment_magnitude=9.0)
    source, image = random(), as_picture(picture())
    changed = [not np.array_equal(as_pixels(rand_augment(image, section, source)), picture()) for _ in range(200)]
    assert 0.6 < np.mean(changed) < 0.85  # each of two is left out by the toss of a coin


def test_a_crop_lies_inside_and_has_the_size_it_should():
    source = random()
    boxes = np.array([crop_box(40, 30, 0.2, source) for _ in range(300)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (right <= 40).all() and (bottom <= 30).all()
    shares = (right - left) * (bottom - top) / 1200
    aspects = (right - left) / (bottom - top)
    assert 0.18 < shares.min() < 0.3 and shares.max() > 0.8
    assert 0.7 < aspects.min() < 0.9 and 1.1 < aspects.max() < 1.45


def test_mirroring_is_for_half_of_the_images():
    section, source = dataclasses.replace(PLAIN, flip=True), random()
    image = picture()
    results = [augmented(image, 16, section, source) for _ in range(100)]
    mirrored = [np.array_equal(result, image[:, ::-1]) for result in results]
    assert all(m or np.array_equal(r, image) for m, r in zip(mirrored, results, strict=True))
    assert 0.35 < np.mean(mirrored) < 0.65


def test_erasing_overwrites_one_rectangle_with_noise():
    source, image = random(), np.zeros((32, 32, 3), np.uint8)
    for _ in range(20):
        changed = (erased(image, "half", source) != image).any(axis=-1)
        rows, columns = changed.any(axis=1).nonzero()[0], changed.any(axis=0).nonzero()[0]
        area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0.5 * area < changed.sum() <= area <= 0.36 * 1024
    assert not image.any()


def test_mixing_averages_pixels_or_takes_a_box():
    dark, bright = np.zeros((4, 4, 1), np.uint8), np.full((4, 4, 1), 200, np.uint8)
    assert (Mixing(0.75)(dark, bright) == 50).all()
    cut = Mixing(0.875, (1, 3, 2, 3))(dark, bright)
    assert (cut[1:3, 2] == 200).all() and cut.sum() == 2 * 200


def test_shares_of_a_mixture():
    assert draw_mixing(16, PLAIN, random()) is None
    source = random()
    mixup = [draw_mixing(16, dataclasses.replace(PLAIN, mixup_alpha=1.0), source) for _ in range(200)]
    assert all(mixing.box is None for mixing in mixup)
    assert 0.4 < np.mean([mixing.share for mixing in mixup]) < 0.6
    both = dataclasses.replace(PLAIN, mixup_alpha=1.0, cutmix_alpha=1.0)
    mixed = [draw_mixing(16, both, source) for _ in range(200)]
    cuts = [mixing for mixing in mixed if mixing.box is not None]
    assert 60 < len(cuts) < 140
    for mixing in cuts:
        ones = np.ones((16, 16, 1), np.uint8)
        assert mixing.share == pytest.approx(mixing(ones, 0 * ones).mean())


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("crop_scale", 0.0, r"a share in \(0, 1\]"), ("erase_probability", 1.5, r"a share in \[0, 1\]"),
        ("rand_augment_magnitude", 11.0, r"a number in \[0, 10\]"), ("mixup_alpha", -1.0, "zero or a positive number"),
        ("normalisation", "none", r"one of \('imagenet', 'half'\)"), ("threads", 0, "a positive number"),
        ("augmentation_repeats", 0, "a positive number"),
        ("flip", 1, "a value of type bool"),
    ],
)  # fmt: skip
def test_fields_out_of_range_are_refused(field, value, expected):
    section = dataclasses.replace(PLAIN, **{field: value})
    with pytest.raises(ValueError, match=rf"data\.images\.{field}={value!r}: expected {expected}"):
        section.check("data.images")
