"""Documents in files: Python's own standard library, or a directory of .txt, .jsonl and .jsonl.gz files.

A .py or .txt file is one document; a line of a .jsonl file is one, its text in the field `data.feature`. A document
goes to the train or to the validation split by a hash of its name (the file's path relative to the source; for .jsonl
the line too), so the same files are split alike on every machine. Text is bytes as they stand in the file. What cannot
be read is refused, or left out by name, see `faults`.
"""

from __future__ import annotations

import errno
import functools
import gzip
import hashlib
import json
import logging
import os
import stat
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from moda_jax.config import DataConfig
from moda_jax.data.faults import DamageError, SkippedDocuments

_logger = logging.getLogger(__name__)

PYTHON_STDLIB = "python_stdlib"
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
CORPUS_VERSION = "1.0.0"  # of the prepared form; a change of it prepares every corpus anew
_DRAIN_BYTES = 2**20


class SourceFile(NamedTuple):
    """A file of documents. `name` is its path relative to the source, with "/", as the file system spells it."""

    path: str
    name: bytes
    size: int
    mtime_ns: int


class Document(NamedTuple):
    """One document: its name, unique in its source, and its text."""

    name: bytes
    text: bytes


def list_files(config: DataConfig) -> list[SourceFile]:
    """The files of a source that is no TFDS dataset, in all folders below it, sorted by name.

    Links are followed; a folder that can be reached twice is entered once.

    Raises:
        ValueError: no such directory, something in it cannot be read, or none of its files can be used.
    """
    if config.source == PYTHON_STDLIB:
        root, suffixes = sysconfig.get_path("stdlib"), (".py",)
        skipped = {"site-packages", "dist-packages", "__pycache__"}  # what is not the interpreter's own source
    else:
        root, suffixes, skipped = str(Path(config.source).expanduser()), SUFFIXES, set()
        if not os.path.isdir(root):
            kind = "is no directory" if os.path.exists(root) else "no such directory"
            raise ValueError(
                f"data.source={config.source!r}: {kind}; expected {PYTHON_STDLIB!r}, a directory of "
                f"{', '.join(SUFFIXES)} files, tfds:NAME or tfds:DIRECTORY"
            )
    files, entered = [], set()
    try:
        for folder, subfolders, names in os.walk(root, onerror=_raise, followlinks=True):
            identity = os.stat(folder)
            if (identity.st_dev, identity.st_ino) in entered:
                subfolders.clear()
                continue
            entered.add((identity.st_dev, identity.st_ino))
            subfolders[:] = sorted(set(subfolders) - skipped)
            paths = [os.path.join(folder, name) for name in names if name.endswith(suffixes)]
            files += [file for path in paths if (file := _source_file(root, path, config)) is not None]
    except OSError as error:
        raise ValueError(
            f"data.source={config.source!r}: {error.filename} cannot be read ({error.strerror})"
        ) from error
    if not files:
        raise ValueError(f"data.source={config.source!r}: {root} holds no file that ends in {', '.join(suffixes)}")
    return sorted(files, key=lambda file: file.name)


def split_documents(files: list[SourceFile], config: DataConfig) -> tuple[Callable[[bytes], str], tuple[str, ...]]:
    """Shares the documents out.

    A document is for validation when the hash of its name, as a number in [0, 1), is below
    `data.validation_fraction`. If that leaves a split empty, the document with the nearest hash changes sides.

    Returns:
        A function from a document's name to its split, and the names of the splits that are not empty: "train" and
        "validation", or "train" alone for a source of one document.

    Raises:
        ValueError: no document at all (.jsonl files of empty lines).
    """
    fraction = config.validation_fraction
    lowest, highest, count = (2.0, b""), (-1.0, b""), 0
    for name, _ in _documents(files, config, SkippedDocuments(config)):
        place = (name_hash(name), name)
        lowest, highest, count = min(lowest, place), max(highest, place), count + 1
        if lowest[0] < fraction <= highest[0]:  # the usual end, after some dozens of documents
            return lambda name: "validation" if name_hash(name) < fraction else "train", ("train", "validation")
    if count == 0:
        raise ValueError(f"data.source={config.source!r}: its {len(files)} files hold no document")
    if count == 1:
        return lambda name: "train", ("train",)
    to, moved = ("validation", lowest[1]) if lowest[0] >= fraction else ("train", highest[1])
    _logger.warning(
        "%s: data.validation_fraction=%s leaves no document for the %s split; %s goes there",
        config.source, fraction, to, os.fsdecode(moved),
    )  # fmt: skip
    other = "train" if to == "validation" else "validation"
    return lambda name: to if name == moved else other, ("train", "validation")


def name_hash(name: bytes) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=6).digest(), "big") / 2.0**48


def read_documents(
    files: list[SourceFile],
    config: DataConfig,
    split_of: Callable[[bytes], str],
    split: str,
    progress: Callable[[int], object] = lambda num_bytes: None,
    skipped: SkippedDocuments | None = None,
) -> Iterator[Document]:
    """The documents of a split, file by file.

    Args:
        files: from `list_files`.
        config: `feature` is the text field of a .jsonl line.
        split_of: from `split_documents`.
        split: "train" or "validation".
        progress: told the bytes of the source files that were read or passed over since the last call.
        skipped: told what is left out, under data.on_damage="skip".

    Raises:
        DamageError: a .jsonl line that is no JSON object, or without a string in `data.feature`; a damaged .gz file; a
            file that changed while it was read; a document that is too large.
    """
    skipped = SkippedDocuments(config) if skipped is None else skipped
    for name, load in _documents(files, config, skipped, progress):
        if split_of(name) == split:
            try:
                text = load()
            except DamageError as error:
                skipped.damaged(os.fsdecode(name), error)
                continue
            yield Document(name, text)


def _documents(
    files: list[SourceFile],
    config: DataConfig,
    skipped: SkippedDocuments,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> Iterator[tuple[bytes, Callable[[], bytes]]]:
    """Every document's name, and a function that reads its text."""
    for file in files:
        if file.path.endswith((".jsonl", ".jsonl.gz")):
            try:
                yield from _json_lines(file, config, progress)
            except DamageError as error:  # of the file: the documents before the damage were good
                skipped.damaged(os.fsdecode(file.name), error)
        else:
            yield file.name, functools.partial(_read_file, file, config)
            progress(file.size)


def _read_file(file: SourceFile, config: DataConfig) -> bytes:
    """The bytes of a file that is one document."""
    _check_size(file.size, f"{os.fsdecode(file.name)} is a document", config)
    try:
        text = Path(file.path).read_bytes()
    except OSError as error:
        raise DamageError(f"data.source={config.source!r}: {file.path} cannot be read ({error})") from error
    if len(text) != file.size:
        raise DamageError(
            f"data.source={config.source!r}: {file.path} changed while it was read "
            f"({file.size} bytes, then {len(text)})"
        )
    return text


def _json_lines(
    file: SourceFile, config: DataConfig, progress: Callable[[int], object]
) -> Iterator[tuple[bytes, Callable[[], bytes]]]:
    """The documents of a .jsonl or .jsonl.gz file; lines of white space are none."""
    number = 0
    try:
        with open(file.path, "rb") as raw:
            lines = gzip.GzipFile(fileobj=raw) if file.path.endswith(".gz") else raw
            done = 0
            for number, (line, size) in enumerate(_bounded_lines(lines, config.max_document_bytes), start=1):
                if line.strip():
                    where = f"{file.path}, line {number}"
                    yield b"%s:%d" % (file.name, number), functools.partial(_parse_line, line, size, where, config)
                if number % 256 == 0:
                    progress(raw.tell() - done)
                    done = raw.tell()
            progress(file.size - done)
    except (OSError, EOFError, zlib.error) as error:  # of reading, and of unzipping a file that is damaged or cut off
        raise DamageError(
            f"data.source={config.source!r}: {file.path} cannot be read ({error}); {number} lines before that could"
        ) from error


def _bounded_lines(file: BinaryIO | gzip.GzipFile, most: int) -> Iterator[tuple[bytes, int]]:
    """Lines and their sizes; of one that is longer than `most`, its beginning. A line need not fit in memory."""
    while line := file.readline(most + 1):
        size = len(line)
        if size > most and not line.endswith(b"\n"):
            while rest := file.readline(_DRAIN_BYTES):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
        yield line, size


def _check_size(size: int, what: str, config: DataConfig) -> None:
    if size > config.max_document_bytes:
        raise DamageError(
            f"data.source={config.source!r}: {what} of {size} bytes; expected at most "
            f"data.max_document_bytes={config.max_document_bytes}"
        )


def _parse_line(line: bytes, size: int, where: str, config: DataConfig) -> bytes:
    """The text of one .jsonl line, as UTF-8.

    Raw bytes that are not UTF-8 pass unchanged, as in a text file; the tokenizer decides about them.
    """
    _check_size(size, f"{where} is a line", config)
    try:
        record = json.loads(line.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise DamageError(f"data.source={config.source!r}: {where} is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise DamageError(
            f"data.source={config.source!r}: {where} is a JSON {type(record).__name__}; expected an object"
        )
    if config.feature not in record:
        raise DamageError(f"data.feature={config.feature!r}: {where} has no such field; it has {sorted(record)}")
    text = record[config.feature]
    if not isinstance(text, str):
        raise DamageError(
            f"data.feature={config.feature!r}: {where} holds a {type(text).__name__} there; expected a string"
        )
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, written as an escape: no UTF-8 form, kept as it came
        return text.encode("utf-8", "surrogatepass")


def _source_file(root: str, path: str, config: DataConfig) -> SourceFile | None:
    """A file's entry, None if it is left out. Only regular files: opening a pipe would wait for ever."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
    except OSError as error:
        if config.on_damage == "fail":
            raise
        _logger.warning("%s: left out, because it cannot be read (%s)", path, error.strerror)
        return None
    name = os.fsencode(os.path.relpath(path, root)).replace(os.fsencode(os.sep), b"/")
    return SourceFile(path, name, status.st_size, status.st_mtime_ns)


def _raise(error: OSError) -> None:
    """os.walk passes over folders that it cannot read; a corpus must not."""
    raise error
