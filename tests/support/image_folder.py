"""Small images in files, for tests."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(pixels, kind="PNG"):
    """uint8 [height, width, 3] or [height, width] as the bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_folder(root: Path, *, classes=("cat", "dog", "hen"), each=8, size=(12, 10)):
    """CLASS/NUMBER.png and .jpg below `root`; returns the PNGs' pixels by their name."""
    source, pixels = np.random.default_rng(0), {}
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(each):
            image = source.integers(0, 256, (*size, 3), dtype=np.uint8)
            kind = "JPEG" if number % 4 == 3 else "PNG"
            path = root / name / f"{number}.{'jpg' if kind == 'JPEG' else 'png'}"
            path.write_bytes(encoded(image, kind))
            if kind == "PNG":
                pixels[f"{name}/{path.name}"] = image
    return pixels
