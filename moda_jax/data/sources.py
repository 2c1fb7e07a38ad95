"""From `data.source` to the documents of a split, prepared in the cache where they come from files."""

from __future__ import annotations

import importlib.metadata
import os
import sysconfig
from collections.abc import Callable
from typing import NamedTuple

from moda_jax.config import DataConfig
from moda_jax.data import corpus
from moda_jax.data.cache import cache_directory, cache_key, prepare_once
from moda_jax.data.listing import is_one_text, say_once
from moda_jax.data.token_store import DocumentSource
from moda_jax.paths import expand_home

SPLITS = ("train", "validation")


class SplitSource(NamedTuple):
    """The documents of a split.

    Attributes:
        name: the split in words, for messages.
        identity: differs whenever the documents may differ.
        open: reads the documents; prepares them first if they come from files and are not in the cache.
    """

    name: str
    identity: str
    open: Callable[[], DocumentSource]


def find_split(config: DataConfig, split: str, *, as_before: bool = False) -> SplitSource:
    """Finds the documents of a split, without reading them.

    Args:
        config: the data section.
        split: "train" or "validation".
        as_before: by the rules of the first version, see `listing.list_files` and `corpus.split_documents`.

    Raises:
        ValueError: no such split; a source that is missing or cannot be used; the message names the config field.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {SPLITS}")
    if len(config.sources) > 1:
        raise ValueError(f"data.source={config.source!r}: is a mixture; expected one source here")
    name = f"{config.source} ({split})"
    if config.source.startswith("tfds:"):
        return SplitSource(name, *_find_tfds(config, split))
    return SplitSource(name, *_find_files(config, split, as_before))


def _find_tfds(config: DataConfig, split: str) -> tuple[str, Callable[[], DocumentSource]]:
    """Identity and opener of a split of a TFDS dataset that others prepared."""
    from moda_jax.data import tfds_source  # half a second to import, and not needed when all is in the cache

    builder = tfds_source.open_tfds(config)
    split_field = f"{split}_split"
    split_name = getattr(config, split_field)
    identity = cache_key(
        directory=os.path.realpath(builder.data_dir),
        files=tfds_source.list_dataset_files(builder),
        feature=config.feature,
        split=split_name,
    )
    return identity, lambda: tfds_source.TfdsSplit(builder, config.feature, split_name, f"data.{split_field}")


def _find_files(config: DataConfig, split: str, as_before: bool) -> tuple[str, Callable[[], DocumentSource]]:
    """Identity and opener of a split of a source of files."""
    files = corpus.list_files(config, as_before=True) if as_before else corpus.list_files(config)
    built_in = config.source == corpus.PYTHON_STDLIB
    # What is not as in the first version is named; without any of it, what that version prepared is found.
    newer = {"separator": config.document_separator} if config.document_separator is not None else {}
    if is_one_text(files, config) and not as_before:
        newer["by_position"] = True
        share = config.validation_fraction
        say_once(
            f"data.source={config.source!r}: one text file, split by position: its first {1 - share:.4g} are for "
            f"training, the last {share:.4g} for validation (data.validation_fraction)"
        )
    key = cache_key(
        root=os.path.realpath(sysconfig.get_path("stdlib") if built_in else expand_home(config.source, "data.source")),
        built_in=built_in,
        feature=None if built_in else config.feature,
        files=[(file.name.hex(), file.size, file.mtime_ns) for file in files],
        validation_fraction=config.validation_fraction,
        on_damage=config.on_damage,
        max_document_bytes=config.max_document_bytes,
        version=corpus.CORPUS_VERSION,
        tfds=importlib.metadata.version("tensorflow-datasets"),
        **newer,
    )

    def open_documents() -> DocumentSource:
        from moda_jax.data import tfds_source

        directory = prepare_once(
            cache_directory(config) / "datasets" / key,
            lambda new: tfds_source.write_text_corpus(new, files, config, as_before=as_before),
            f"Corpus {config.source}",
        )
        builder = tfds_source.open_text_corpus(directory)
        if split not in builder.info.splits:
            raise ValueError(f"data.source={config.source!r}: holds a single document; two splits need at least two")
        return tfds_source.TfdsSplit(builder, "text", split, "split", prepared_in=directory)

    return cache_key(corpus=key, split=split), open_documents
