"""Random changes of training images on the host, in NumPy and Pillow: DeiT's recipe (arXiv 2012.12877).

One image: a random crop, a mirror image, RandAugment (arXiv 1909.13719), random erasing (arXiv 1708.04896). Two images:
mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899). Everything random comes from the generator that is handed in, so
a row of a run is the same however the work is shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from moda_jax.vision_config import NORMALISATIONS, ImageDataSection

_CROP_TRIES = 10
_CROP_ASPECTS = (3 / 4, 4 / 3)
_ERASE_AREAS = (0.02, 1 / 3)
_ERASE_ASPECTS = (0.3, 1 / 0.3)
_LEVELS = 10.0  # RandAugment's magnitudes go from 0 to here


def augmented(pixels: np.ndarray, size: int, section: ImageDataSection, random: np.random.Generator) -> np.ndarray:
    """One image after crop, mirroring, RandAugment and erasing.

    Args:
        pixels: uint8 [height, width, channels].
        size: of the result.
        section: which of them, and how much.
        random: their only source of chance.

    Returns:
        uint8 [size, size, channels].
    """
    image = as_picture(pixels)
    if section.crop_scale < 1:
        box = crop_box(image.width, image.height, section.crop_scale, random)
    else:
        box = middle_box(image.width, image.height, 1.0)
    image = resized(image, size, box)
    if section.flip and random.random() < 0.5:
        image = ImageOps.mirror(image)
    if section.rand_augment_magnitude:
        image = rand_augment(image, section, random)
    pixels = as_pixels(image)
    if section.erase_probability and random.random() < section.erase_probability:
        pixels = erased(pixels, section.normalisation, random)
    return pixels


def as_picture(pixels: np.ndarray) -> Image.Image:
    """uint8 [height, width, channels] as Pillow's image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def as_pixels(image: Image.Image) -> np.ndarray:
    """The reverse of `as_picture`."""
    return np.array(image).reshape(image.height, image.width, -1)


def middle_box(width: int, height: int, share: float) -> tuple[float, float, float, float]:
    """Left, top, right and bottom edge of the square in the middle, `share` of the shorter side long."""
    side = min(width, height) * share
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def crop_box(width: int, height: int, least: float, random: np.random.Generator) -> tuple[float, float, float, float]:
    """A random part of an image: a share of its area in [least, 1], an aspect ratio in [3/4, 4/3] (its logarithm
    uniform); after some that do not fit, the square in the middle."""
    for _ in range(_CROP_TRIES):
        area = width * height * random.uniform(least, 1.0)
        aspect = math.exp(random.uniform(*map(math.log, _CROP_ASPECTS)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(random.integers(0, room + 1)) for room in (width - w, height - h))
            return left, top, left + w, top + h
    return middle_box(width, height, 1.0)


def resized(image: Image.Image, size: int, box: tuple[float, float, float, float]) -> Image.Image:
    """A part of an image, size x size pixels, by bicubic interpolation; the same image where nothing changes."""
    if image.size == (size, size) and box == (0, 0, size, size):
        return image
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def erased(pixels: np.ndarray, normalisation: str, random: np.random.Generator) -> np.ndarray:
    """With noise in a random rectangle: of a normal distribution after normalisation."""
    height, width, channels = pixels.shape
    mean, deviation = (255.0 * np.array(part) for part in NORMALISATIONS[normalisation])
    for _ in range(_CROP_TRIES):
        area = height * width * random.uniform(*_ERASE_AREAS)
        aspect = math.exp(random.uniform(*map(math.log, _ERASE_ASPECTS)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1))
            noise = mean + deviation * random.standard_normal((h, w, channels))
            pixels = pixels.copy()
            pixels[top : top + h, left : left + w] = np.clip(np.rint(noise), 0, 255).astype(np.uint8)
            break
    return pixels


# RandAugment.


def rand_augment(image: Image.Image, section: ImageDataSection, random: np.random.Generator) -> Image.Image:
    """Some of `OPERATIONS`, drawn with replacement, each done or left out by the toss of a coin.

    The magnitude of each is drawn from a normal distribution around the configured one and cut to 0..10; all get
    stronger with it.
    """
    names = sorted(OPERATIONS)
    for _ in range(section.rand_augment_operations):
        operation = OPERATIONS[names[int(random.integers(len(names)))]]
        applied = random.random() < 0.5
        level = random.normal(section.rand_augment_magnitude, section.rand_augment_spread)
        sign = 1.0 if random.random() < 0.5 else -1.0
        if applied:
            image = operation(image, float(np.clip(level, 0.0, _LEVELS)) / _LEVELS, sign)
    return image


def _moved(image: Image.Image, *matrix: float) -> Image.Image:
    """An affine map from places of the result to places of the image; what comes from outside is grey."""
    grey = 128 if image.mode == "L" else (128,) * 3
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=grey)


def _rotated(image: Image.Image, level: float, sign: float) -> Image.Image:
    grey = 128 if image.mode == "L" else (128,) * 3
    return image.rotate(30.0 * level * sign, Image.Resampling.BICUBIC, fillcolor=grey)


def _solarize_added(image: Image.Image, level: float, sign: float) -> Image.Image:
    """The darker half of the values is made brighter."""
    more = int(110 * level)
    table = [min(255, value + more) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _enhanced(kind: Callable) -> Callable[[Image.Image, float, float], Image.Image]:
    return lambda image, level, sign: kind(image).enhance(max(0.1, 1.0 + 0.9 * level * sign))


# Name -> (image, level from 0 to 1, sign 1 or -1) -> image.
OPERATIONS: dict[str, Callable[[Image.Image, float, float], Image.Image]] = {
    "autocontrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "rotate": _rotated,
    "posterize": lambda image, level, sign: ImageOps.posterize(image, max(1, 4 - int(4 * level))),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - int(256 * level)),
    "solarize_add": _solarize_added,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, sign: _moved(image, 1, 0.3 * level * sign, 0, 0, 1, 0),
    "shear_y": lambda image, level, sign: _moved(image, 1, 0, 0, 0.3 * level * sign, 1, 0),
    "translate_x": lambda image, level, sign: _moved(image, 1, 0, 0.45 * level * sign * image.width, 0, 1, 0),
    "translate_y": lambda image, level, sign: _moved(image, 1, 0, 0, 0, 1, 0.45 * level * sign * image.height),
}


# Two images.


class Mixing(NamedTuple):
    """How two images are mixed.

    Attributes:
        share: of the image itself; the other's is the rest.
        box: top, bottom, left, right of what comes from the other (CutMix); None: all pixels are averaged (mixup).
    """

    share: float
    box: tuple[int, int, int, int] | None = None

    def __call__(self, own: np.ndarray, other: np.ndarray) -> np.ndarray:
        """uint8 [size, size, channels] of both."""
        if self.box is None:
            mixed = self.share * own.astype(np.float32) + (1.0 - self.share) * other.astype(np.float32)
            return np.rint(mixed).astype(np.uint8)
        top, bottom, left, right = self.box
        mixed = own.copy()
        mixed[top:bottom, left:right] = other[top:bottom, left:right]
        return mixed


def draw_mixing(size: int, section: ImageDataSection, random: np.random.Generator) -> Mixing | None:
    """What two images share: the same for both. None: nothing is mixed.

    Args:
        size: of the images.
        section: the parameters of both beta distributions, and how often CutMix is taken where both are on.
        random: the source of chance.
    """
    mixup, cutmix = section.mixup_alpha, section.cutmix_alpha
    if not (mixup or cutmix):
        return None
    cuts = bool(cutmix) and (not mixup or random.random() < section.cutmix_probability)
    share = float(random.beta(cutmix, cutmix) if cuts else random.beta(mixup, mixup))
    if not cuts:
        return Mixing(share)
    half = size * math.sqrt(1.0 - share) / 2
    y, x = random.uniform(0, size, 2)
    top, bottom, left, right = (
        round(min(max(place, 0.0), size)) for place in (y - half, y + half, x - half, x + half)
    )  # fmt: skip
    return Mixing(1.0 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right))
