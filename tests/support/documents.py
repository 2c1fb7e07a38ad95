"""Small corpora, TFDS datasets and separate processes for the data tests."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from moda_jax.config import DataConfig

REPOSITORY = Path(__file__).parents[2]


def write_texts(directory: Path, texts: Mapping[str, bytes]) -> Path:
    """Files with these names and contents; a list value becomes JSON lines, packed when the name ends in .gz."""
    for name, content in texts.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = b"".join(json.dumps(record).encode() + b"\n" for record in content)
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return directory


def random_texts(number: int, seed: int = 0, longest: int = 120) -> dict[str, bytes]:
    """Files of random ASCII, of 1 to `longest` bytes."""
    rng = np.random.default_rng(seed)
    return {
        f"{i % 3}/{i}.txt": rng.integers(32, 127, rng.integers(1, longest + 1)).astype(np.uint8).tobytes()
        for i in range(number)
    }


def data_config(directory: Path, cache: Path, **fields: Any) -> DataConfig:
    """A data section over a directory, with a cache of its own."""
    return DataConfig(**{"source": str(directory), "cache_dir": str(cache), "sequence_length": 16, **fields})


def write_tfds(
    directory: Path, features: Mapping[str, Any], splits: Mapping[str, list[dict]], name: str = "small_dataset"
) -> Path:
    """Prepares a TFDS dataset as array_record; returns its directory (NAME/VERSION)."""

    def info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(dict(features)))

    builder_class = type(
        "SmallDataset",
        (tfds.core.GeneratorBasedBuilder,),
        {
            "name": name,
            "VERSION": tfds.core.Version("1.0.0"),
            "code_path": None,
            "_info": info,
            "_split_generators": lambda self, _: {split: enumerate(rows) for split, rows in splits.items()},
            "_generate_examples": lambda self: None,
        },
        skip_registration=True,
    )
    builder = builder_class(data_dir=directory, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def start_python(code: str, *arguments: object) -> subprocess.Popen:
    """A separate interpreter in the repository that runs `code`; stdout and stderr are pipes of text."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
