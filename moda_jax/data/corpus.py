"""Documents in files: Python's own standard library, a directory of files, or one file; `listing` says which files.

A .py, .txt or .md file is one document, or several where `data.document_separator` parts them; a line of a .jsonl file
and a row of a .parquet file is one, its text in the field `data.feature`. A document goes to the train or to the
validation split by a hash of its name (the file's path relative to the source, with the number of the part, line or
row), so the same files are split alike on every machine. A source of one text file is split by position: its beginning
is for training, its end for validation. Text is bytes as they stand in the file. What cannot be read is refused, or
left out by name, see `faults`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import logging
import mmap
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from moda_jax.config import DataConfig
from moda_jax.data.damage import DamageError, SkippedDocuments, is_lfs_pointer
from moda_jax.data.listing import (
    PYTHON_STDLIB,
    SUFFIXES,
    SourceFile,
    is_one_text,
    is_parquet,
    is_text,
    list_files,
)

__all__ = [
    "CORPUS_VERSION", "PYTHON_STDLIB", "SUFFIXES", "Document", "SourceFile", "SplitByPosition", "list_files",
    "name_hash", "read_documents", "split_documents",
]  # fmt: skip

_logger = logging.getLogger(__name__)

CORPUS_VERSION = "1.0.0"  # of the prepared form; a change of it prepares every corpus anew
_DRAIN_BYTES = 2**20
_NEWLINE_WITHIN = 2**16  # bytes behind the place of a cut in which the end of a line is looked for
_ROWS = 256  # of a .parquet file, read at once


class Document(NamedTuple):
    """One document: its name, unique in its source, and its text."""

    name: bytes
    text: bytes


@dataclasses.dataclass(frozen=True)
class SplitByPosition:
    """Which split a part of the one text file belongs to.

    Attributes:
        last_train: number of the last part that is for training.
        cut: where the file is cut in two, in bytes; None: a separator parts it.
    """

    last_train: int
    cut: int | None

    def __call__(self, name: bytes) -> str:
        """The split of the part that is called FILE:NUMBER."""
        return "train" if int(name.rsplit(b":", 1)[1]) <= self.last_train else "validation"


def split_documents(
    files: list[SourceFile], config: DataConfig, *, as_before: bool = False
) -> tuple[Callable[[bytes], str], tuple[str, ...]]:
    """Shares the documents out.

    A document is for validation when the hash of its name, as a number in [0, 1), is below
    `data.validation_fraction`. If that leaves a split empty, the document with the nearest hash changes sides. One text
    file is split by position instead.

    Args:
        files: from `list_files`.
        config: the data section.
        as_before: by the rules of the first version, in which one text file was one document.

    Returns:
        A function from a document's name to its split, and the names of the splits that are not empty: "train" and
        "validation", or "train" alone for a source of one document.

    Raises:
        ValueError: no document at all (.jsonl files of empty lines).
    """
    fraction = config.validation_fraction
    if is_one_text(files, config) and not as_before:
        by_position = _split_by_position(files[0], config)
        if by_position is not None:
            return by_position, ("train", "validation")
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
    cut = split_of.cut if isinstance(split_of, SplitByPosition) else None
    for name, load in _documents(files, config, skipped, progress, cut):
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
    cut: int | None = None,
) -> Iterator[tuple[bytes, Callable[[], bytes]]]:
    """Every document's name, and a function that reads its text before the next name is asked for."""
    for file in files:
        try:
            if is_parquet(file):
                yield from _rows(file, config)
                progress(file.size)
            elif not is_text(file):
                yield from _json_lines(file, config, progress)
            elif config.document_separator is None and cut is None:
                yield file.name, functools.partial(_read_file, file, config)
                progress(file.size)
            else:
                for number, begin, end in _parts(file, config, cut):
                    yield b"%s:%d" % (file.name, number), functools.partial(_read_part, file, begin, end, config)
                    progress(end - begin)
        except DamageError as error:  # of the file: the documents before the damage were good
            skipped.damaged(os.fsdecode(file.name), error)


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
    _refuse_pointer(text, file, config)
    return text


def _read_part(file: SourceFile, begin: int, end: int, config: DataConfig) -> bytes:
    """The bytes [begin, end) of a text file."""
    hint = "" if config.document_separator else "; data.document_separator parts a file into documents"
    _check_size(end - begin, f"{os.fsdecode(file.name)} holds a document", config, hint)
    try:
        with open(file.path, "rb") as source:
            source.seek(begin)
            text = source.read(end - begin)
            size = os.fstat(source.fileno()).st_size
    except OSError as error:
        raise DamageError(f"data.source={config.source!r}: {file.path} cannot be read ({error})") from error
    if size != file.size:
        raise DamageError(
            f"data.source={config.source!r}: {file.path} changed while it was read ({file.size} bytes, then {size})"
        )
    if begin == 0:
        _refuse_pointer(text, file, config)
    return text


def _parts(file: SourceFile, config: DataConfig, cut: int | None) -> Iterator[tuple[int, int, int]]:
    """Number, from 1, begin and end of a text file's documents; parts of white space are none."""
    if config.document_separator is None:
        yield from ((1, 0, cut), (2, cut, file.size))
        return
    separator = config.document_separator.encode("utf-8")
    with _mapped(file, config) as text:
        begin = number = 0
        while begin <= len(text):
            number, end = number + 1, text.find(separator, begin)
            end = len(text) if end < 0 else end
            if end - begin > config.max_document_bytes or text[begin:end].strip():
                yield number, begin, end
            begin = end + len(separator)


def _split_by_position(file: SourceFile, config: DataConfig) -> SplitByPosition | None:
    """The beginning of the file for training, its end for validation; None: it is too small to be parted."""
    place = int(file.size * (1 - config.validation_fraction))
    if config.document_separator is None:
        with _mapped(file, config) as text:
            end_of_line = text.find(b"\n", max(0, place - 1), place + _NEWLINE_WITHIN) + 1
            cut = end_of_line if 0 < end_of_line < len(text) else max(1, place)
            while cut < len(text) and text[cut] & 0xC0 == 0x80:  # inside of a character
                cut += 1
            return SplitByPosition(1, cut) if cut < len(text) else None
    last_train = previous = None  # the last part but one is for training at the latest, the first one always
    for number, begin, _ in _parts(file, config, None):
        if last_train is None or begin < place:
            previous, last_train = last_train, number
        end = number
    if last_train is None:
        return None
    last_train = previous if last_train == end else last_train
    return None if last_train is None else SplitByPosition(last_train, None)


@contextlib.contextmanager
def _mapped(file: SourceFile, config: DataConfig) -> Iterator[bytes | mmap.mmap]:
    """The bytes of a file, not read before they are looked at."""
    try:
        with open(file.path, "rb") as source:
            if os.fstat(source.fileno()).st_size == 0:  # cannot be mapped
                yield b""
                return
            with mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                yield mapped
    except OSError as error:
        raise DamageError(f"data.source={config.source!r}: {file.path} cannot be read ({error})") from error


def _rows(file: SourceFile, config: DataConfig) -> Iterator[tuple[bytes, Callable[[], bytes]]]:
    """The documents of a .parquet file, the rows of its column `data.feature`."""
    import pyarrow as pa  # an extra; `listing` looked for it
    import pyarrow.parquet

    number = 0
    try:
        with open(file.path, "rb") as source:
            head = source.read(256)
        _refuse_pointer(head, file, config)
        with pa.parquet.ParquetFile(file.path) as table:
            columns = table.schema_arrow
            if config.feature not in columns.names:
                raise DamageError(
                    f"data.feature={config.feature!r}: {file.path} has no such column; it has {sorted(columns.names)}"
                )
            kind = columns.field(config.feature).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DamageError(f"data.feature={config.feature!r}: {file.path} holds {kind} there; expected strings")
            for batch in table.iter_batches(batch_size=_ROWS, columns=[config.feature]):
                # As bytes: text that is not UTF-8 passes unchanged, as in a text file.
                texts = batch.column(0).cast(kind).cast(pa.large_binary())
                for text in texts:
                    number += 1
                    yield b"%s:%d" % (file.name, number), functools.partial(_row_text, text, file, number, config)
    except (OSError, pa.ArrowException) as error:
        raise DamageError(
            f"data.source={config.source!r}: {file.path} cannot be read ({error}); {number} rows before that could"
        ) from error


def _row_text(text, file: SourceFile, number: int, config: DataConfig) -> bytes:
    """The bytes of a row's text."""
    where = f"{file.path}, row {number}"
    if not text.is_valid:
        raise DamageError(f"data.feature={config.feature!r}: {where} holds nothing there; expected a string")
    data = text.as_py()
    _check_size(len(data), f"{where} is a document", config)
    return data


def _json_lines(
    file: SourceFile, config: DataConfig, progress: Callable[[int], object]
) -> Iterator[tuple[bytes, Callable[[], bytes]]]:
    """The documents of a file of JSON lines; lines of white space are none."""
    number, compressed = 0, file.path.lower().endswith(".gz")
    if compressed and file.size == 0:
        raise DamageError(
            f"data.source={config.source!r}: {file.path} has no bytes, which no compressed file is; its download was "
            "cut off"
        )
    try:
        with open(file.path, "rb") as raw:
            lines = gzip.GzipFile(fileobj=raw) if compressed else raw
            done = 0
            for number, (line, size) in enumerate(_bounded_lines(lines, config.max_document_bytes), start=1):
                if number == 1:
                    _refuse_pointer(line, file, config)
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


def _refuse_pointer(head: bytes, file: SourceFile, config: DataConfig) -> None:
    if is_lfs_pointer(head):
        raise DamageError(
            f"data.source={config.source!r}: {file.path} is a Git LFS pointer, not the file itself; fetch it with "
            "`git lfs pull`"
        )


def _check_size(size: int, what: str, config: DataConfig, hint: str = "") -> None:
    if size > config.max_document_bytes:
        raise DamageError(
            f"data.source={config.source!r}: {what} of {size} bytes; expected at most "
            f"data.max_document_bytes={config.max_document_bytes}{hint}"
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
    except RecursionError as error:
        raise DamageError(f"data.source={config.source!r}: {where} is JSON that is nested too deeply") from error
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
