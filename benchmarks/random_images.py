"""JPEGs of smooth noise, of about the size in bytes that photographs have: images for a benchmark without any."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 300  # pixels of a side
CLASSES = 10
_QUALITY = 90
# Noise of so many points along a side, and its share of the image: coarse shapes, texture, grain.
_OCTAVES = ((5, 0.45), (20, 0.25), (75, 0.15), (SIZE, 0.15))


def parse_request(text: str) -> tuple[Path, int]:
    """From FOLDER:COUNT.

    Raises:
        ValueError: it is none.
    """
    folder, _, count = text.rpartition(":")
    if not folder or not count.isdecimal() or int(count) < CLASSES:
        raise ValueError(f"expected FOLDER:COUNT, COUNT images of which {CLASSES} classes get at least one each")
    return Path(folder), int(count)


def write_splits(folder: Path, count: int) -> str:
    """`train` with `count` images and `val` with a tenth of them, in class folders; the same at every call.

    Returns:
        What was written, in words.

    Raises:
        ValueError: the folder is there and not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    paths = []
    for split, images in enumerate((count, max(CLASSES, count // 10))):
        for number in range(images):
            paths.append(folder / ("train", "val")[split] / f"class_{number % CLASSES}" / f"{number:06d}.jpg")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            smooth_noise(np.random.default_rng((split, number))).save(paths[-1], "JPEG", quality=_QUALITY)
    kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1e3
    return f"{folder}: {len(paths)} JPEGs of {SIZE} x {SIZE} pixels, {kilobytes:.0f} kB each"


def smooth_noise(source: np.random.Generator) -> Image.Image:
    """An RGB image that is a sum of noise at several scales."""
    total = np.zeros((SIZE, SIZE, 3), np.float32)
    for points, share in _OCTAVES:
        noise = Image.fromarray(source.integers(0, 256, (points, points, 3), dtype=np.uint8))
        total += share * np.asarray(noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray(np.rint(total).astype(np.uint8))
