"""TFDS datasets: written from files of documents, and read, without TensorFlow.

Only the array_record format can be read without TensorFlow, so only that is written and accepted.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import tqdm_utils

from moda_jax.config import DataConfig
from moda_jax.data import corpus
from moda_jax.data.damage import DamageError, SkippedDocuments, read_skipped
from moda_jax.paths import expand_home
from moda_jax.progress import progress_bar

ARRAY_RECORD = "array_record"


class TextCorpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Files of documents as a TFDS dataset with the splits "train" and "validation"; features: name, text.

    Args:
        files: from `corpus.list_files`.
        config: the data section.
        skipped: told what is left out.
        bar: the progress bar, in bytes of the files.
        as_before: see `corpus.split_documents`.
        **builder_arguments: of a TFDS builder.
    """

    VERSION = tfds.core.Version(corpus.CORPUS_VERSION)
    # TFDS looks beside the code for checksums of downloads. We have none, and for a class inside a package that look-up
    # imports importlib_resources, which TFDS 4.9.10 does not declare as a dependency.
    code_path = None

    def __init__(self, *, files, config, skipped, bar, as_before, **builder_arguments):
        self._files, self._config, self._skipped, self._bar = files, config, skipped, bar
        self._as_before = as_before
        super().__init__(**builder_arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, description="Documents from files.", features=features)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        split_of, splits = corpus.split_documents(self._files, self._config, as_before=self._as_before)
        return {split: self._generate_examples(split_of, split) for split in splits}

    def _generate_examples(self, split_of, split) -> Iterator[tuple[bytes, dict[str, bytes]]]:
        self._bar.set_postfix_str(f"{split}: reading")
        for document in corpus.read_documents(
            self._files, self._config, split_of, split, self._bar.update, self._skipped
        ):
            yield document.name, {"name": document.name, "text": document.text}
        self._bar.set_postfix_str(f"{split}: writing")


def write_text_corpus(
    directory: Path, files: list[corpus.SourceFile], config: DataConfig, *, as_before: bool = False
) -> None:
    """Writes files of documents as a TFDS dataset into `directory`, with a progress bar.

    TFDS orders the documents by a hash of their names, so any beginning of a split is a fair sample of it. Documents
    that are left out are named in skipped.jsonl beside it.
    """
    skipped = SkippedDocuments(config)
    total = 2 * sum(file.size for file in files)  # each split passes over all files
    with progress_bar(total=total, unit="B", unit_scale=True, desc="Preparing the corpus") as bar, _quiet_tfds():
        builder = TextCorpus(
            files=files, config=config, skipped=skipped, bar=bar, as_before=as_before, data_dir=directory,
            file_format=ARRAY_RECORD,
        )  # fmt: skip
        builder.download_and_prepare()
    shutil.rmtree(directory / "downloads", ignore_errors=True)  # TFDS makes it, empty
    skipped.write(directory)


def open_text_corpus(directory: Path) -> tfds.core.DatasetBuilder:
    """The dataset that `write_text_corpus` wrote."""
    return tfds.builder_from_directory(directory / TextCorpus.name / corpus.CORPUS_VERSION)


class TfdsSplit:
    """One split of a dataset, read by position.

    Args:
        builder: the dataset.
        feature: name of the text or token feature.
        split: name of the split, in TFDS's notation ("train", "train[:90%]").
        split_field: the config field that named the split, for messages.
        prepared_in: where `write_text_corpus` wrote the dataset; None: others made it.

    Attributes:
        holds_tokens: the feature holds token ids, not text.
        skipped: documents of the source that were left out when the dataset was made, and why.

    Raises:
        ValueError: the dataset is not prepared as array_record, or has no such split or feature, or the feature holds
            neither text nor tokens.
    """

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        feature: str,
        split: str,
        split_field: str,
        prepared_in: Path | None = None,
    ):
        where = str(builder.data_dir)
        features = builder.info.features
        if feature not in features:
            raise ValueError(
                f"data.feature={feature!r}: the dataset {where} has no such feature; it has {_names(features)}"
            )
        connector = features[feature]
        shape, dtype = connector.shape, connector.np_dtype
        is_leaf = not isinstance(shape, dict)
        is_text = is_leaf and shape == () and dtype == np.object_
        self.holds_tokens = bool(is_leaf and len(shape) == 1 and np.issubdtype(dtype, np.integer))
        if not is_text and not self.holds_tokens:
            raise ValueError(
                f"data.feature={feature!r}: in {where} it is {_one_line(connector)}; expected text, or token "
                f"ids (a 1-D integer feature). The dataset has {_names(features)}"
            )
        try:
            self._examples = builder.as_data_source(split, file_format=ARRAY_RECORD)
        except ValueError as error:  # unknown name or bad notation
            known = ", ".join(map(repr, builder.info.splits))
            raise ValueError(
                f"{split_field}={split!r}: the dataset {where} has the splits {known} ({error})"
            ) from error
        self._feature, self._dtype = feature, dtype
        self._where, self._split, self._has_names = where, split, prepared_in is not None
        self.skipped = read_skipped(prepared_in) if prepared_in else {}

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        """A document: text as bytes, or token ids as an integer array [n].

        Raises:
            DamageError: the record cannot be read.
        """
        try:
            document = self._examples[index][self._feature]
        except (RuntimeError, OSError) as error:  # RuntimeError: array_record's word for all that is wrong with a file
            raise DamageError(
                f"data.source: record {index} of the split {self._split!r} in {self._where} cannot be read ({error})"
            ) from error
        return np.asarray(document, self._dtype) if self.holds_tokens else document  # a Sequence comes as a list

    def name_of(self, index: int) -> str:
        """The document's name: in its source, or its number in the split."""
        number = f"record {index} of the split {self._split!r}"
        if not self._has_names:
            return number
        try:
            return os.fsdecode(self._examples[index]["name"])
        except (RuntimeError, OSError):  # the record that cannot be read is the one that is asked about
            return number


def open_tfds(config: DataConfig) -> tfds.core.DatasetBuilder:
    """The prepared dataset that data.source="tfds:..." names, found by directory or by name.

    A name is looked for in TFDS_DATA_DIR, or where TFDS keeps datasets by default. Nothing is downloaded or generated.

    Raises:
        ValueError: no such dataset, or it is not prepared as array_record.
    """
    address = config.source.removeprefix("tfds:")
    directory = expand_home(address, "data.source")
    # A folder that happens to have a dataset's name is not meant, unless it holds a dataset itself.
    is_path = address.startswith(("/", "./", "../", "~")) or ("/" in address and directory.is_dir())
    if is_path or (directory / "dataset_info.json").is_file():
        builder = _open_directory(config, directory)
    else:
        try:
            builder = tfds.core.read_only_builder.builder_from_files(
                address, data_dir=os.environ.get("TFDS_DATA_DIR") or None
            )
        except tfds.core.registered.DatasetNotFoundError as error:
            raise ValueError(f"data.source={config.source!r}: no prepared dataset of that name ({error})") from error
    available = {builder.info.file_format, *builder.info.alternative_file_formats}
    formats = {getattr(kind, "value", kind) for kind in available}
    if ARRAY_RECORD not in formats:
        raise ValueError(
            f"data.source={config.source!r}: {builder.data_dir} is prepared as {', '.join(sorted(map(str, formats)))}; "
            "TensorFlow would be needed to read that, and is not used here. Prepare the dataset again with "
            'tfds.builder(..., file_format="array_record") or `tfds build --file_format=array_record`'
        )
    return builder


def list_dataset_files(builder: tfds.core.DatasetBuilder) -> list[tuple[str, int, int]]:
    """(name, size, mtime in ns) of the dataset's files: they change when its content does."""
    paths = sorted(path for path in Path(builder.data_dir).iterdir() if path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _open_directory(config: DataConfig, directory: Path) -> tfds.core.DatasetBuilder:
    """The dataset in a directory that holds a dataset_info.json."""
    if not directory.is_dir():
        raise ValueError(f"data.source={config.source!r}: no such directory")
    if not (directory / "dataset_info.json").is_file():
        inside = sorted(str(path.parent) for path in directory.glob("*/dataset_info.json"))
        hint = f"; there is one in {', '.join(inside)}" if inside else ""
        raise ValueError(
            f"data.source={config.source!r}: {directory} holds no dataset_info.json; expected a prepared TFDS dataset "
            f"(NAME/VERSION){hint}"
        )
    return tfds.builder_from_directory(directory)


def _names(features: Any) -> str:
    """The features and their kinds, in one line."""
    return ", ".join(f"{name!r} ({_one_line(connector)})" for name, connector in sorted(features.items()))


def _one_line(connector: Any) -> str:
    return " ".join(repr(connector).split())


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """TFDS talks of downloads on stdout and draws bars without a total; ours stands instead."""
    bars_were_on = tqdm_utils._active
    tqdm_utils.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm_utils.display_progress_bar(bars_were_on)
