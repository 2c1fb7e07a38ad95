"""Labelled images from every source, and what is damaged among them."""

import io
import json
import logging
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from support.image_folder import encoded, write_folder

from moda_jax.config import DataConfig
from moda_jax.data.file_guard import DataLostError
from moda_jax.data.images import decode_image, in_validation, open_images
from moda_jax.vision_config import ImageDataSection


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_folder(root / "folder")
    return root


def config(place, source="folder", **fields):
    source = source if ":" in source or source == "digits" else str(place / source)
    return DataConfig(source=source, cache_dir=str(place / "cache"), **{"validation_fraction": 0.3} | fields)


def test_the_digits_are_those_that_scikit_learn_ships(place):
    train, validation = (open_images(config(place, "digits"), split, 1) for split in ("train", "validation"))
    assert len(train) + len(validation) == 1797 and 0.25 < len(validation) / 1797 < 0.35
    assert train.classes == tuple("0123456789")
    assert train.fingerprint != validation.fingerprint
    from sklearn.datasets import load_digits

    first = next(i for i in range(1797) if not in_validation(f"{i:04d}", config(place)))
    image = train.read(0)
    assert image.dtype == np.uint8 and image.shape == (8, 8, 1)
    np.testing.assert_allclose(image[..., 0], load_digits().images[first] * 255 / 16, atol=0.5)
    assert train.labels[0] == load_digits().target[first]
    assert open_images(config(place, "digits"), "train", 3).read(0).shape == (8, 8, 3)


def test_a_folder_is_split_by_name_and_read_as_it_lies(place):
    pixels = write_folder(place / "plain")
    splits = [open_images(config(place, "plain"), split, 3) for split in ("train", "validation")]
    assert [split.classes for split in splits] == [("cat", "dog", "hen")] * 2
    assert sum(map(len, splits)) == 24 and all(map(len, splits))
    for split, is_validation in zip(splits, (False, True), strict=True):
        names = [name for name in sorted(pixels) if in_validation(name, config(place)) == is_validation]
        wanted = {pixels[name].tobytes(): split.classes.index(name.split("/")[0]) for name in names}
        found = {split.read(i).tobytes(): int(split.labels[i]) for i in range(len(split))}
        assert wanted.items() <= found.items()


def test_a_folder_of_splits(place):
    for name, each in (("train", 3), ("val", 2)):
        write_folder(place / "parts" / name, each=each)
    shutil.rmtree(place / "parts" / "val" / "dog")
    fields = {"validation_split": "val"}
    train, validation = (
        open_images(config(place, "parts", **fields), split, 3) for split in ("train", "validation")
    )  # fmt: skip
    assert (len(train), len(validation)) == (9, 4)
    assert validation.labels.tolist() == [0, 0, 2, 2]  # by the training split's classes
    with pytest.raises(ValueError, match=r"holds the folder 'train', expected both data\.train_split='train' and"):
        open_images(config(place, "parts"), "train", 3)
    (place / "parts" / "val" / "eel").mkdir()
    with pytest.raises(ValueError, match=r"holds the class 'eel', which the training split has not"):
        open_images(config(place, "parts", **fields), "validation", 3)


def test_a_moved_folder_is_the_same_data_and_a_changed_image_is_not(place):
    write_folder(place / "first")
    before = open_images(config(place, "first"), "train", 3).fingerprint
    shutil.copytree(place / "first", place / "second")
    assert open_images(config(place, "second"), "train", 3).fingerprint == before
    name = next(f"cat/{i}.png" for i in (0, 1, 2, 4) if not in_validation(f"cat/{i}.png", config(place)))
    (place / "second" / name).write_bytes(encoded(np.zeros((4, 4, 3), np.uint8)))
    assert open_images(config(place, "second"), "train", 3).fingerprint != before


DAMAGES = {
    "cut off": lambda good: good[: len(good) // 2],
    "empty": lambda good: b"",
    "text": lambda good: b"not an image",
    "pointer": lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_damaged_image_is_refused_by_name_or_left_out(tmp_path, kind, suffix, caplog):
    write_folder(tmp_path / "folder", each=6)
    number = 3 if suffix == "jpg" else 4
    bad = tmp_path / "folder" / "dog" / f"{number}.{suffix}"
    bad.write_bytes(DAMAGES[kind](bad.read_bytes()))
    split = "validation" if in_validation(f"dog/{bad.name}", config(tmp_path)) else "train"
    with pytest.raises(ValueError, match=rf"data\.on_damage='fail': .*, image dog/{bad.name}: "):
        open_images(config(tmp_path), split, 3)
    good = sum(in_validation(f"{name}/{i}.{'jpg' if i == 3 else 'png'}", config(tmp_path)) == (split == "validation")
               for name in ("cat", "dog", "hen") for i in range(6))  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="moda_jax"):
        assert len(open_images(config(tmp_path, on_damage="skip"), split, 3)) == good - 1
    assert f"dog/{bad.name}" in caplog.text
    (skipped,) = (tmp_path / "cache" / "images").glob("*/skipped.jsonl")
    assert json.loads(skipped.read_text())["name"] == f"dog/{bad.name}"


def test_an_image_that_changes_under_a_run_is_noticed(tmp_path):
    write_folder(tmp_path / "folder")
    images = open_images(config(tmp_path), "train", 3)
    for path in (tmp_path / "folder").glob("*/*"):
        path.write_bytes(encoded(np.zeros((5, 5, 3), np.uint8)))
    with pytest.raises(DataLostError, match=r"cat/\d\.(png|jpg): was changed after the run's data was checked"):
        images.read(0)
    shutil.rmtree(tmp_path / "folder")
    with pytest.raises(DataLostError, match=r"cat/\d\.(png|jpg): cannot be read"):
        images.read(0)


def test_images_of_other_kinds_are_converted():
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    np.testing.assert_array_equal(decode_image(encoded(grey), 3), np.repeat(grey[..., None], 3, axis=-1))
    assert decode_image(encoded(np.zeros((4, 6, 3), np.uint8)), 1).shape == (4, 6, 1)
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(file, "PNG")
    with pytest.raises(ValueError, match="its pixels have more than 8 bits a channel"):
        decode_image(file.getvalue(), 3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", r"data\.source='.*nowhere': expected 'digits', a folder of class folders"),
        ("empty", r"data\.source=.*holds no class folder"),
        ("hollow", r"data\.source=.*: the train split has no image"),
        ("s3://bucket", r"data\.source='s3://bucket': is remote"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(place, source, message):
    (place / "empty").mkdir(exist_ok=True)
    (place / "hollow" / "cat").mkdir(parents=True, exist_ok=True)
    with pytest.raises(ValueError, match=message):
        open_images(config(place, source), "train", 3)


def test_other_channels_than_one_or_three_are_refused(place):
    with pytest.raises(ValueError, match=r"model\.image\.channels=4: expected 1 \(grey\) or 3"):
        open_images(config(place), "train", 4)


class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["round", "square"]),
            "name": tfds.features.Text(),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            image = io.BytesIO(encoded(np.full((4, 5, 3), 50 * i, np.uint8), "JPEG" if i % 2 else "PNG"))
            yield i, {"image": image, "label": i % 2, "name": str(i)}


def test_a_tfds_dataset(tmp_path):
    builder = Shapes(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    source = f"tfds:{builder.data_dir}"
    fields = {"validation_split": "test"}
    train, validation = (open_images(config(tmp_path, source, **fields), s, 3) for s in ("train", "validation"))
    assert train.classes == ("round", "square")
    assert sorted((round(train.read(i).mean() / 50), int(train.labels[i])) for i in range(5)) == [
        (0, 0), (1, 1), (2, 0), (3, 1), (4, 0),
    ]  # fmt: skip
    assert len(validation) == 3 and validation.read(0).shape == (4, 5, 3)
    with pytest.raises(ValueError, match=r"data\.images\.label_feature='name': expected a feature of kind ClassLabel"):
        open_images(config(tmp_path, source, images=ImageDataSection(label_feature="name")), "train", 3)
    with pytest.raises(ValueError, match=r"data\.validation_split='validation': the dataset .* has the splits"):
        open_images(config(tmp_path, source), "validation", 3)
