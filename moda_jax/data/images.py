"""Labelled images: the digits that scikit-learn ships, a folder of class folders, or a TFDS dataset.

Every image of a folder or dataset is decoded once before a run begins, and its digest is kept in the cache: so a
damaged one is refused or left out by name at the start, and one that is changed later is noticed when it is read. A
split's fingerprint is over labels and content, in order; a folder may be moved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from moda_jax.config import DataConfig, check_local
from moda_jax.data.cache import cache_directory, cache_key, prepare_once
from moda_jax.data.corpus import name_hash
from moda_jax.data.damage import DamageError, SkippedDocuments, is_lfs_pointer, log_skipped, read_skipped
from moda_jax.data.file_guard import DataLostError
from moda_jax.paths import expand_home
from moda_jax.progress import progress_bar

_logger = logging.getLogger(__name__)

DIGITS = "digits"  # data.source
SUFFIXES = (".jpg", ".jpeg", ".png")
IMAGES_VERSION = "1"  # of what the cache holds
_MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels
# What Pillow raises for files that are no image, or are cut off or damaged somewhere.
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
_DIGEST_BYTES = 16


@dataclasses.dataclass(frozen=True)
class ImageSplit:
    """Labelled images, read by position.

    Attributes:
        name: the split in words, for messages.
        labels: int32 [n], numbers of classes.
        classes: their names.
        fingerprint: differs whenever an image or a label does.
        read: position -> uint8 [height, width, channels].
    """

    name: str
    labels: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str
    read: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)


class Records(Protocol):
    """Encoded images where they lie."""

    def __len__(self) -> int: ...

    def name_of(self, index: int) -> str:
        """For messages, unique."""
        ...

    def fetch(self, index: int) -> tuple[bytes, int]:
        """The file's bytes, and the label.

        Raises:
            DamageError: it cannot be read.
        """
        ...


def open_images(config: DataConfig, split: str, channels: int) -> ImageSplit:
    """A split of `data.source`; what the cache does not know is checked first, with progress on stderr.

    Args:
        config: the data section.
        split: "train" or "validation".
        channels: of a pixel, 1 or 3: images of another kind are converted.

    Raises:
        ValueError: a source that is missing, empty or not usable, or (`data.on_damage`) holds a damaged image; the
            message names the config field.
    """
    if channels not in _MODES:
        raise ValueError(f"model.image.channels={channels}: expected 1 (grey) or 3 (red, green, blue)")
    if config.source == DIGITS:
        found = _digits(config, split, channels)
    elif config.source.startswith("tfds:"):
        found = _tfds(config, split, channels)
    else:
        found = _folder(config, split, channels)
    if not len(found):
        raise ValueError(f"data.source={config.source!r}: the {split} split has no image")
    return found


def decode_image(content: bytes, channels: int) -> np.ndarray:
    """A JPEG or PNG as uint8 [height, width, channels].

    Raises:
        DamageError: it is none, or damaged, or has more than 8 bits a channel.
    """
    if is_lfs_pointer(content[:256]):
        raise DamageError("a Git LFS pointer, not the image itself; fetch it with `git lfs pull`")
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            if image.mode[0] in "IF":
                raise DamageError(f"its pixels have more than 8 bits a channel (mode {image.mode})")
            pixels = np.asarray(image.convert(_MODES[channels]))
    except DamageError:
        raise
    except _DECODE_ERRORS as error:
        raise DamageError(f"cannot be decoded ({' '.join(str(error).split())})") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def in_validation(name: str, config: DataConfig) -> bool:
    """Whether an image of a source without splits is one of validation, by a hash of its name."""
    return name_hash(os.fsencode(name)) < config.validation_fraction


# The digits.


def _digits(config: DataConfig, split: str, channels: int) -> ImageSplit:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            f"data.source={DIGITS!r}: comes with scikit-learn, which is not installed; pip install 'moda-jax[vision]'"
        ) from error
    digits = load_digits()
    chosen = [i for i in range(len(digits.target)) if in_validation(f"{i:04d}", config) == (split == "validation")]
    grey = np.rint(digits.images[chosen] * (255.0 / 16.0)).astype(np.uint8)  # 0..16 in the file
    images = np.repeat(grey[..., None], channels, axis=-1)
    labels = digits.target[chosen].astype(np.int32)
    return ImageSplit(
        f"{DIGITS} ({split})", labels, tuple(map(str, digits.target_names)), _fingerprint(labels, images),
        images.__getitem__,
    )  # fmt: skip


# Encoded images.


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """Reads images that were checked before."""

    records: Records
    kept: np.ndarray
    digests: np.ndarray
    channels: int

    def __call__(self, position: int) -> np.ndarray:
        index = int(self.kept[position])
        try:
            content, _ = self.records.fetch(index)
        except DamageError as error:
            raise DataLostError(f"{error}; it was readable when the run's data was checked") from error
        if _digest(content) != self.digests[position].tobytes():
            raise DataLostError(f"{self.records.name_of(index)}: was changed after the run's data was checked")
        return decode_image(content, self.channels)


def _checked(
    config: DataConfig, split: str, channels: int, records: Records, classes: tuple[str, ...], **facts: Any
) -> ImageSplit:
    """The images of `records` that are good; `facts` differ whenever these may."""
    name = f"{config.source} ({split})"
    key = cache_key(kind="images", version=IMAGES_VERSION, on_damage=config.on_damage, classes=classes, **facts)
    directory = cache_directory(config) / "images" / key
    prepare_once(directory, lambda new: _check_all(new, config, name, records), f"Images {name}")
    log_skipped(name, directory, read_skipped(directory))
    kept, labels, digests = (np.load(directory / f"{part}.npy") for part in ("kept", "labels", "digests"))
    read = _Encoded(records, kept, digests, channels)
    return ImageSplit(name, labels, classes, _fingerprint(labels, digests), read)


def _check_all(directory: Path, config: DataConfig, name: str, records: Records) -> None:
    """Decodes every image, and writes which are good, with their labels and digests."""
    skipped = SkippedDocuments(config)

    def check(index: int) -> tuple[bytes, int] | DamageError:
        try:
            content, label = records.fetch(index)
            if len(content) > config.max_document_bytes:
                raise DamageError(f"has {len(content)} bytes, more than data.max_document_bytes")
            decode_image(content, 3)
        except DamageError as error:
            return error
        return _digest(content), label

    kept, labels, digests = [], [], []
    with (
        ThreadPoolExecutor(config.images.threads) as pool,
        progress_bar(total=len(records), unit=" images", desc=f"Checking {name}") as bar,
    ):
        for index, found in enumerate(pool.map(check, range(len(records)))):
            bar.update(1)
            if isinstance(found, DamageError):
                where = records.name_of(index)
                message = f"data.on_damage='fail': {name}, image {where}: {found}"
                skipped.damaged(where, DamageError(message))
                continue
            kept.append(index)
            digests.append(np.frombuffer(found[0], np.uint8))
            labels.append(found[1])
    np.save(directory / "kept.npy", np.array(kept, np.int64))
    np.save(directory / "labels.npy", np.array(labels, np.int32))
    np.save(directory / "digests.npy", np.array(digests, np.uint8).reshape(-1, _DIGEST_BYTES))
    skipped.write(directory)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def _fingerprint(labels: np.ndarray, content: np.ndarray) -> str:
    return hashlib.blake2b(labels.tobytes() + content.tobytes(), digest_size=12).hexdigest()


# A folder.


@dataclasses.dataclass(frozen=True)
class _Files:
    """Files below a folder, with their labels."""

    root: Path
    names: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    def name_of(self, index: int) -> str:
        return self.names[index]

    def fetch(self, index: int) -> tuple[bytes, int]:
        try:
            return (self.root / self.names[index]).read_bytes(), self.labels[index]
        except OSError as error:
            raise DamageError(f"{self.names[index]}: cannot be read ({error})") from error


def _folder(config: DataConfig, split: str, channels: int) -> ImageSplit:
    """CLASS/FILE below the source, split by name; or SPLIT/CLASS/FILE."""
    check_local("data.source", config.source)
    root = expand_home(config.source, "data.source")
    if not root.is_dir():
        raise ValueError(
            f"data.source={config.source!r}: expected {DIGITS!r}, a folder of class folders with .jpg, .jpeg and .png "
            "files, or tfds:NAME"
        )
    parts = {"train": config.train_split, "validation": config.validation_split}
    there = [name for name in parts.values() if (root / name).is_dir()]
    if len(there) == 1:
        raise ValueError(
            f"data.source={config.source!r}: holds the folder {there[0]!r}, expected both data.train_split="
            f"{config.train_split!r} and data.validation_split={config.validation_split!r}, or neither"
        )
    where = root / parts[split] if there else root
    classes = _class_names(root / config.train_split if there else root, config)
    unknown = sorted(set(_class_names(where, config)) - set(classes))
    if unknown:
        raise ValueError(
            f"data.source={config.source!r}: {where} holds the class {unknown[0]!r}, which the training split has not"
        )
    files: list[tuple[str, int, int, int]] = []
    for label, name in enumerate(classes):
        if not (where / name).is_dir():
            continue
        for entry in sorted(os.scandir(where / name), key=lambda entry: entry.name):
            inside = f"{name}/{entry.name}"
            if entry.name.startswith(".") or not entry.name.lower().endswith(SUFFIXES) or not entry.is_file():
                continue
            if there or in_validation(inside, config) == (split == "validation"):
                status = entry.stat()
                files.append((inside, label, status.st_size, status.st_mtime_ns))
    names, labels = tuple(file[0] for file in files), tuple(file[1] for file in files)
    return _checked(
        config, split, channels, _Files(where, names, labels), classes,
        root=os.path.realpath(where), files=[(os.fsencode(file[0]).hex(), *file[2:]) for file in files],
    )  # fmt: skip


def _class_names(directory: Path, config: DataConfig) -> tuple[str, ...]:
    names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"data.source={config.source!r}: {directory} holds no class folder")
    return tuple(names)


# TFDS.


class _TfdsImages:
    """The encoded images of a TFDS split."""

    def __init__(self, config: DataConfig, builder: Any, split: str):
        import tensorflow_datasets as tfds

        from moda_jax.data.tfds_source import ARRAY_RECORD

        features, where = builder.info.features, builder.data_dir
        image, label = config.images.image_feature, config.images.label_feature
        for field, name, kind in (
            ("image_feature", image, tfds.features.Image), ("label_feature", label, tfds.features.ClassLabel),
        ):  # fmt: skip
            if name not in features or not isinstance(features[name], kind):
                known = ", ".join(f"{key!r} ({type(feature).__name__})" for key, feature in sorted(features.items()))
                raise ValueError(
                    f"data.images.{field}={name!r}: expected a feature of kind {kind.__name__}; {where} has {known}"
                )
        self._features, self._where, self.split = (image, label), where, getattr(config, f"{split}_split")
        self.classes = tuple(features[label].names or map(str, range(features[label].num_classes)))
        try:
            self._examples = builder.as_data_source(
                self.split, decoders={image: tfds.decode.SkipDecoding()}, file_format=ARRAY_RECORD
            )
        except ValueError as error:
            known = ", ".join(map(repr, builder.info.splits))
            raise ValueError(
                f"data.{split}_split={self.split!r}: the dataset {where} has the splits {known} ({error})"
            ) from error

    def __len__(self) -> int:
        return len(self._examples)

    def name_of(self, index: int) -> str:
        return f"record {index} of the split {self.split!r} in {self._where}"

    def fetch(self, index: int) -> tuple[bytes, int]:
        try:
            example = self._examples[index]
        except (RuntimeError, OSError) as error:  # RuntimeError: array_record's word for all that is wrong with a file
            raise DamageError(f"{self.name_of(index)}: cannot be read ({error})") from error
        image, label = (example[name] for name in self._features)
        return bytes(image), int(label)


def _tfds(config: DataConfig, split: str, channels: int) -> ImageSplit:
    from moda_jax.data import tfds_source  # half a second to import

    builder = tfds_source.open_tfds(config)
    records = _TfdsImages(config, builder, split)
    return _checked(
        config, split, channels, records, records.classes, directory=os.path.realpath(builder.data_dir),
        files=tfds_source.list_dataset_files(builder), part=records.split,
        features=[config.images.image_feature, config.images.label_feature],
    )  # fmt: skip
