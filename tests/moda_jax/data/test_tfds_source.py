"""TFDS datasets prepared by others: found by directory and by name, text and tokens, every refusal."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from support.documents import write_tfds

from moda_jax.config import DataConfig
from moda_jax.data.pipeline import open_dataset
from moda_jax.data.tfds_source import TfdsSplit, open_tfds
from moda_jax.data.tokenizer import ByteTokenizer

TEXTS = {"train": [f"document {i}" for i in range(12)], "validation": ["held out, and long enough for a row"]}
TOKENS = {
    split: [np.arange(i % 4, dtype=np.uint16) + 10 * i for i in range(len(texts))] for split, texts in TEXTS.items()
}
FEATURES = {
    "text": tfds.features.Text(),
    "tokens": tfds.features.Tensor(shape=(None,), dtype=np.uint16),
    "sequence": tfds.features.Sequence(np.int64),
    "label": tfds.features.ClassLabel(num_classes=3),
    "lines": tfds.features.Sequence(tfds.features.Text()),
    "nested": {"text": tfds.features.Text()},
}


@pytest.fixture(scope="module")
def dataset_directory(tmp_path_factory):
    splits = {
        split: [
            {
                "text": text,
                "tokens": tokens,
                "sequence": tokens.tolist(),
                "label": 1,
                "lines": [],
                "nested": {"text": ""},
            }
            for text, tokens in zip(TEXTS[split], TOKENS[split], strict=True)
        ]
        for split in TEXTS
    }
    return write_tfds(tmp_path_factory.mktemp("tfds"), FEATURES, splits)


def section(source, tmp_path, **fields):
    return DataConfig(
        **{"source": f"tfds:{source}", "cache_dir": str(tmp_path / "cache"), "sequence_length": 8} | fields
    )


def documents_of(dataset):
    return [dataset.tokens[a:b].tolist() for a, b in zip(dataset.offsets, dataset.offsets[1:], strict=False)]


def rewrite_info(directory, target, **changes):
    """A copy of the dataset whose dataset_info.json says something else."""
    shutil.copytree(directory, target)
    info = json.loads((target / "dataset_info.json").read_text()) | changes
    (target / "dataset_info.json").write_text(json.dumps(info))
    return target


def test_text_by_directory(dataset_directory, tmp_path):
    for split, texts in TEXTS.items():
        dataset = open_dataset(section(dataset_directory, tmp_path), split, ByteTokenizer())
        assert sorted(documents_of(dataset)) == sorted([*text.encode(), 256] for text in texts)


@pytest.mark.parametrize("feature", ["tokens", "sequence"])
def test_tokens_skip_the_tokenizer(dataset_directory, tmp_path, feature):
    dataset = open_dataset(section(dataset_directory, tmp_path, feature=feature), "train", ByteTokenizer())
    expected = [[*tokens.tolist(), 256] for tokens in TOKENS["train"] if len(tokens)]
    assert sorted(documents_of(dataset)) == sorted(expected)


@pytest.mark.parametrize("name", ["small_dataset", "small_dataset:1.0.0"])
def test_by_name(dataset_directory, tmp_path, monkeypatch, name):
    monkeypatch.setenv("TFDS_DATA_DIR", str(dataset_directory.parents[1]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small_dataset").mkdir()  # not what is meant
    by_name = open_dataset(section(name, tmp_path), "train", ByteTokenizer())
    by_directory = open_dataset(section(dataset_directory, tmp_path), "train", ByteTokenizer())
    assert by_name.fingerprint == by_directory.fingerprint


def test_named_splits_and_their_parts(dataset_directory, tmp_path):
    fields = {"train_split": "train[:75%]", "validation_split": "train[75%:]"}
    config = section(dataset_directory, tmp_path, **fields)
    parts = [documents_of(open_dataset(config, split, ByteTokenizer())) for split in ("train", "validation")]
    assert [len(part) for part in parts] == [9, 3]
    whole = open_dataset(section(dataset_directory, tmp_path), "train", ByteTokenizer())
    assert parts[0] + parts[1] == documents_of(whole)


def test_a_second_format_beside_array_record(dataset_directory, tmp_path):
    copy = rewrite_info(
        dataset_directory, tmp_path / "copy", fileFormat="tfrecord", alternativeFileFormats=["array_record"]
    )
    assert len(TfdsSplit(open_tfds(section(copy, tmp_path)), "text", "train", "data.train_split")) == 12


class TestErrors:
    def check(self, config, message, split="train"):
        with pytest.raises(ValueError, match=message):
            open_dataset(config, split, ByteTokenizer())
        assert not [path for path in Path(config.cache_dir).glob("tokens/*") if path.is_dir()]

    def test_tfrecord_needs_tensorflow(self, dataset_directory, tmp_path):
        copy = rewrite_info(dataset_directory, tmp_path / "copy", fileFormat="tfrecord")
        self.check(
            section(copy, tmp_path), rf"data\.source='tfds:{copy}': .*prepared as tfrecord; TensorFlow would be needed"
        )

    def test_no_such_directory(self, tmp_path):
        self.check(section(tmp_path / "no", tmp_path), rf"data\.source='tfds:{tmp_path}/no': no such directory")

    def test_not_a_dataset(self, dataset_directory, tmp_path):
        self.check(section(tmp_path, tmp_path), r"holds no dataset_info\.json; expected .*\(NAME/VERSION\)$")
        name = dataset_directory.parent
        self.check(section(name, tmp_path), rf"holds no dataset_info\.json.*; there is one in {dataset_directory}")

    def test_no_such_name(self, dataset_directory, tmp_path, monkeypatch):
        monkeypatch.setenv("TFDS_DATA_DIR", str(dataset_directory.parents[1]))
        self.check(section("absent", tmp_path), r"data\.source='tfds:absent': no prepared dataset of that name")
        self.check(section("small_dataset:2.0.0", tmp_path), r"'tfds:small_dataset:2\.0\.0': no prepared dataset")

    def test_no_such_feature(self, dataset_directory, tmp_path):
        self.check(
            section(dataset_directory, tmp_path, feature="body"),
            r"data\.feature='body': the dataset .* has no such feature; it has .*'label'.*'text' \(Text",
        )

    @pytest.mark.parametrize("feature", ["label", "lines", "nested"])
    def test_neither_text_nor_tokens(self, dataset_directory, tmp_path, feature):
        self.check(
            section(dataset_directory, tmp_path, feature=feature),
            rf"data\.feature='{feature}': in .*; expected text, or token ids",
        )

    @pytest.mark.parametrize("name", ["test", "train[:x%]"])
    def test_no_such_split(self, dataset_directory, tmp_path, name):
        config = section(dataset_directory, tmp_path, validation_split=name)
        self.check(config, r"data\.validation_split='.*': .* has the splits 'train', 'validation'", "validation")

    def test_token_ids_outside_of_the_vocabulary(self, tmp_path):
        rows = {"train": [{"ids": [1, 2, 300]}]}
        directory = write_tfds(tmp_path / "tfds", {"ids": tfds.features.Sequence(np.int32)}, rows)
        self.check(
            section(directory, tmp_path, feature="ids"),
            r"data\.feature: tfds:.* holds token ids 1\.\.300; data\.tokenizer has 0\.\.256",
        )
