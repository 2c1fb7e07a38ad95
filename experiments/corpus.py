"""The corpus of a plan, tokenised once, in a form that travels: one file, unpacked in seconds on any machine.

    DIRECTORY/tokenizer.json
    DIRECTORY/tokens/train/, validation/     what `data.source=tokens:DIRECTORY/tokens` reads
    DIRECTORY/evaluation/NAME/               the validation split's documents of one source, or documents held out
    DIRECTORY/corpus.json                    what it was made from

A document goes to the validation split by the hash of its name, as everywhere else in this project.
"""

from __future__ import annotations

import json
import logging
import lzma
import os
import random
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moda_jax.config import DataConfig
from moda_jax.data.corpus import name_hash
from moda_jax.data.token_store import prepare_tokens
from moda_jax.data.tokenizer import Tokenizer, load_tokenizer
from moda_jax.data.train_tokenizer import train_bpe

_logger = logging.getLogger(__name__)

CORPUS_FILE = "corpus.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENS = "tokens"
EVALUATION = "evaluation"
HELD_OUT_BYTES = 5 * 10**6  # of text: about a million tokens
HELD_OUT_SEED = 0
SUFFIXES = (".jsonl", ".jsonl.xz")
_NO_SOURCE = "unnamed"


class _Documents(list):
    """Texts in memory as the token store reads them."""

    holds_tokens = False

    def name_of(self, index: int) -> str:
        return f"document {index}"


def prepare(
    corpus: Path, directory: Path, tokenizer: Path | None = None, vocab_size: int = 50304, source: str | None = None
) -> Path:
    """Makes `directory` from a corpus; there is nothing to do if it is there.

    Args:
        corpus: holds `train/` and, if documents are held out, `held_out/`: .jsonl or .jsonl.xz files of objects with
            "text" and "source".
        directory: the finished thing.
        tokenizer: a tokenizer.json; None: one is trained on the text.
        vocab_size: of a tokenizer that is trained.
        source: keep the documents of this source alone; None: all.

    Returns:
        `directory`.

    Raises:
        ValueError: there is no text there.
    """
    if (directory / CORPUS_FILE).is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = DataConfig()
    splits: dict[str, _Documents] = {"train": _Documents(), "validation": _Documents()}
    by_source: dict[str, _Documents] = {}
    for name, record in _records(corpus / "train"):
        text, kind = record["text"].encode(), record.get("source", _NO_SOURCE)
        if source is not None and kind != source:
            continue
        split = "validation" if name_hash(name) < config.validation_fraction else "train"
        splits[split].append(text)
        if split == "validation":
            by_source.setdefault(kind, _Documents()).append(text)
    if not all(splits.values()):
        raise ValueError(f"--corpus={corpus}: its train/ holds no document for a split; expected files {SUFFIXES}")
    target = directory / TOKENIZER_FILE
    if tokenizer is not None:
        shutil.copyfile(tokenizer, target)
    elif not target.is_file():
        _train_tokenizer(splits["train"], vocab_size, target)
    loaded = load_tokenizer(DataConfig(tokenizer=str(target)))
    for split, documents in splits.items():
        _tokenise(directory / TOKENS / split, documents, loaded, f"{corpus.name} ({split})")
    sets = {f"validation/{kind}": documents for kind, documents in sorted(by_source.items())}
    held_out = [record["text"].encode() for _, record in _records(corpus / "held_out")] if _has_held_out(corpus) else []
    if held_out:
        sets["held_out"] = _sample(held_out)
    facts = {"evaluation": {}, "tokens": {}, "tokenizer": loaded.fingerprint, "vocab_size": loaded.vocab_size}
    for name, documents in sets.items():
        place = name.replace("/", "_")
        count = _tokenise(directory / EVALUATION / place, documents, loaded, name)
        facts["evaluation"][name] = {
            "directory": place, "documents": len(documents), "tokens": count, "bytes": sum(map(len, documents)),
        }  # fmt: skip
    for split, documents in splits.items():
        count = json.loads((directory / TOKENS / split / "meta.json").read_text())["num_tokens"]
        facts["tokens"][split] = {"documents": len(documents), "tokens": count, "bytes": sum(map(len, documents))}
    (directory / (CORPUS_FILE + ".new")).write_text(json.dumps(facts, indent=1) + "\n")
    os.replace(directory / (CORPUS_FILE + ".new"), directory / CORPUS_FILE)
    return directory


def pack(directory: Path, archive: Path) -> None:
    """Writes a prepared directory as one .tar.xz."""
    temporary = archive.with_name(archive.name + ".new")
    with tarfile.open(temporary, "w:xz", preset=6) as file:
        for path in sorted(directory.rglob("*")):
            if path.is_file() and not path.name.endswith(".lock"):
                file.add(path, arcname=str(path.relative_to(directory)))
    os.replace(temporary, archive)


def unpack(archive: Path, directory: Path) -> Path:
    """Unpacks what `pack` wrote; there is nothing to do if `directory` is complete.

    Raises:
        ValueError: the file is no such archive.
    """
    if (directory / CORPUS_FILE).is_file():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        unpacked = Path(temporary) / "corpus"
        try:
            with tarfile.open(archive, "r:xz") as file:
                file.extractall(unpacked, filter="data")
        except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
            raise ValueError(f"--data={archive}: cannot be unpacked ({error})") from error
        if not (unpacked / CORPUS_FILE).is_file():
            raise ValueError(f"--data={archive}: holds no {CORPUS_FILE}; expected what `prepare` wrote")
        shutil.rmtree(directory, ignore_errors=True)  # what an interrupted process left
        unpacked.rename(directory)
    return directory


def facts(directory: Path) -> dict:
    """What corpus.json says: documents, tokens and bytes of splits and evaluation sets; the tokenizer's fingerprint."""
    return json.loads((directory / CORPUS_FILE).read_text())


def _has_held_out(corpus: Path) -> bool:
    return (corpus / "held_out").is_dir()


def _records(folder: Path) -> Iterator[tuple[bytes, dict]]:
    """(name, object) of every line of a folder's files; the name is the unpacked file's and the line's."""
    paths = sorted(path for path in folder.glob("*") if path.name.endswith(SUFFIXES)) if folder.is_dir() else []
    if not paths:
        raise ValueError(f"--corpus: {folder} holds no file that ends in {', '.join(SUFFIXES)}")
    for path in paths:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            name = path.name.removesuffix(".xz").encode()
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield b"%s:%d" % (name, number), json.loads(line)


def _sample(documents: list[bytes]) -> _Documents:
    """A fixed random subset of `HELD_OUT_BYTES`, whole documents."""
    order = list(range(len(documents)))
    random.Random(HELD_OUT_SEED).shuffle(order)
    chosen, size = [], 0
    for index in order:
        if size + len(documents[index]) <= HELD_OUT_BYTES:
            chosen.append(index)
            size += len(documents[index])
    return _Documents(documents[index] for index in sorted(chosen))


def _tokenise(directory: Path, documents: _Documents, tokenizer: Tokenizer, name: str) -> int:
    """Tokens of documents in the token store's form; their number."""
    return prepare_tokens(directory, lambda: documents, tokenizer, name).num_tokens


def _train_tokenizer(documents: _Documents, vocab_size: int, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.mkdir()
        with (text / "train.jsonl").open("w") as file:
            for document in documents:
                file.write(json.dumps({"text": document.decode()}) + "\n")
        train_bpe(DataConfig(source=str(text), cache_dir=str(Path(folder) / "cache")), vocab_size, target)
