"""The config sections of vision: the model's, `model.image.*`, and the data's, `data.images.*`."""

from __future__ import annotations

import dataclasses

from moda_jax.config_checks import check_types, require, require_not_negative, require_positive

POOLINGS = ("class_token", "mean")
POSITIONS = ("learned", "sincos", "rotary")


@dataclasses.dataclass(frozen=True)
class ImageModelSection:
    """An image as tokens, and the head: read by a vision transformer alone.

    Attributes:
        size: height and width of an image, pixels.
        patch_size: height and width of a patch, pixels; divides `size`.
        channels: of a pixel.
        num_classes: rows of the head.
        pooling: what the head gets: "class_token": a learned token's output, which stands before the patches; "mean":
            the mean of the patches' outputs.
        positions: "learned": a table that is added to the tokens; "sincos": a fixed table of sines and cosines, half of
            the channels for the row and half for the column; "rotary": queries and keys are rotated, half of each head
            by the row and half by the column (`model.rope_theta` is the base).
    """

    size: int = 224
    patch_size: int = 16
    channels: int = 3
    num_classes: int = 1000
    pooling: str = "class_token"
    positions: str = "learned"

    def check(self, name: str) -> None:
        """Checks the fields; `name` stands before theirs in messages.

        Raises:
            ValueError: naming the field, what came and what was expected.
        """
        check_types(name, self)
        require_positive(name, self, "size", "patch_size", "channels", "num_classes")
        for field, choices in (("pooling", POOLINGS), ("positions", POSITIONS)):
            require(getattr(self, field) in choices, f"{name}.{field}", getattr(self, field), f"one of {choices}")
        require(
            self.size % self.patch_size == 0, f"{name}.patch_size", self.patch_size, f"a divisor of {name}.size="
            f"{self.size}",
        )  # fmt: skip

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.size // self.patch_size

    @property
    def tokens(self) -> int:
        """T: the patches, and the class token where there is one."""
        return self.grid**2 + int(self.pooling == "class_token")

    @property
    def pixels(self) -> int:
        """Numbers in a patch."""
        return self.patch_size**2 * self.channels


# Mean and standard deviation of the channels, on a scale where white is 1.
NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5,), (0.5,)),
}


@dataclasses.dataclass(frozen=True)
class ImageDataSection:
    """How images are read, and made into what the model gets: read by the vision task alone.

    Attributes:
        image_feature, label_feature: of a TFDS dataset: an image, and a class.
        crop_fraction: of validation: an image's shorter side is resized to `model.image.size` / `crop_fraction`, and
            the middle is cut out.
        normalisation: what is subtracted from a pixel and what it is then divided by: "imagenet": the mean and standard
            deviation of ImageNet's three channels; "half": 1/2 and 1/2, from -1 to 1, for any number of channels.
        threads: of a process, that decode images.
        workers: processes that make batches; 0: the threads of the training process do. A batch does not depend on it.
        augmentation_repeats: rows of training that an image fills in a row, each augmented by itself, before the next
            images come; an epoch has as many rows as without, so of so many times fewer images. 1: off.
        crop_scale: of training: the smallest share of an image's area that is cut out and resized; 1: the middle is.
        flip: of training: half of the images are mirrored.
        rand_augment_magnitude: of RandAugment's operations, from 0 (none is done) to 10.
        rand_augment_operations: that an image may meet, one after the other.
        rand_augment_spread: standard deviation of the magnitude from operation to operation.
        erase_probability: share of the training images in which a rectangle is overwritten by noise.
        mixup_alpha, cutmix_alpha: of the beta distribution from which the share of an image in a mixture of two is
            drawn; 0: no mixup, no CutMix.
        cutmix_probability: where both are on, of CutMix.
        label_smoothing: share of a training target that is spread evenly over all classes.
    """

    image_feature: str = "image"
    label_feature: str = "label"
    crop_fraction: float = 0.875
    normalisation: str = "imagenet"
    threads: int = 4
    workers: int = 0
    augmentation_repeats: int = 1
    crop_scale: float = 1.0
    flip: bool = False
    rand_augment_magnitude: float = 0.0
    rand_augment_operations: int = 2
    rand_augment_spread: float = 0.5
    erase_probability: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    cutmix_probability: float = 0.5
    label_smoothing: float = 0.0

    def check(self, name: str) -> None:
        """As `ImageModelSection.check`."""
        check_types(name, self)
        require_positive(name, self, "threads", "augmentation_repeats", "rand_augment_operations")
        require_not_negative(
            name, self, "workers", "rand_augment_magnitude", "rand_augment_spread", "mixup_alpha", "cutmix_alpha"
        )
        for field in ("crop_fraction", "crop_scale"):
            require(0 < getattr(self, field) <= 1, f"{name}.{field}", getattr(self, field), "a share in (0, 1]")
        for field in ("erase_probability", "cutmix_probability", "label_smoothing"):
            require(0 <= getattr(self, field) <= 1, f"{name}.{field}", getattr(self, field), "a share in [0, 1]")
        require(
            self.rand_augment_magnitude <= 10, f"{name}.rand_augment_magnitude", self.rand_augment_magnitude,
            "a number in [0, 10]",
        )  # fmt: skip
        require(
            self.normalisation in NORMALISATIONS, f"{name}.normalisation", self.normalisation,
            f"one of {tuple(NORMALISATIONS)}",
        )  # fmt: skip
