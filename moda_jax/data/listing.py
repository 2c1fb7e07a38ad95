"""Which files of a source are read, and what is passed over, said by ending and count.

    .txt, .md                         text: one document, or several where `data.document_separator` is set
    .jsonl, .jsonl.gz                 a document per line
    .json, .json.gz                   the same, where the first line is an object with the field `data.feature`
    .parquet                          a document per row

Endings may be written in capitals. Hidden and system names (`.git`, `.ipynb_checkpoints`, `._copy.txt`, `__MACOSX`) are
no part of a corpus: what lies there is often a copy of a document, and could land in the other split.
"""

from __future__ import annotations

import collections
import errno
import gzip
import importlib.util
import json
import logging
import os
import stat
import sysconfig
import zlib
from collections.abc import Iterable
from typing import NamedTuple

from moda_jax.config import DataConfig
from moda_jax.data.damage import is_lfs_pointer
from moda_jax.paths import expand_home

_logger = logging.getLogger(__name__)

PYTHON_STDLIB = "python_stdlib"
TEXT_SUFFIXES = (".txt", ".md")
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
PARQUET_SUFFIX = ".parquet"
SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, PARQUET_SUFFIX)
_UNSURE_SUFFIXES = (".json", ".json.gz")  # JSON lines, or anything else
_SYSTEM_NAMES = {"__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
_COMPRESSIONS = {".gz", ".bz2", ".xz", ".zst", ".zip"}

# What was read before .json, .md, .parquet, capitals and hidden names were thought of: runs of then go on with it.
_OLDER_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")

_said: set[str] = set()


class SourceFile(NamedTuple):
    """A file of documents. `name` is its path relative to the source, with "/", as the file system spells it."""

    path: str
    name: bytes
    size: int
    mtime_ns: int


def list_files(config: DataConfig, *, as_before: bool = False) -> list[SourceFile]:
    """The files of a source that is no TFDS dataset: one, or those in all folders below it, sorted by name.

    Links are followed; a folder that can be reached twice is entered once. What is passed over is logged, once.

    Args:
        config: the data section.
        as_before: by the rules of the first version: .txt, .jsonl and .jsonl.gz, hidden names included.

    Raises:
        ValueError: no such file or directory, something in it cannot be read, or none of its files can be used.
        NotImplementedError: there are .parquet files, and pyarrow is not installed.
    """
    if config.source == PYTHON_STDLIB:
        skipped = {"site-packages", "dist-packages", "__pycache__"}  # what is not the interpreter's own source
        return _walk(sysconfig.get_path("stdlib"), (".py",), skipped, config)
    root = str(expand_home(config.source, "data.source"))
    if os.path.isdir(root):
        if as_before:
            return _walk(root, _OLDER_SUFFIXES, set(), config)
        return _walk_openly(root, config)
    expected = f"{PYTHON_STDLIB!r}, a file or a directory of {', '.join(SUFFIXES)} files, tfds:NAME or tfds:DIRECTORY"
    if as_before or not os.path.exists(root):
        raise ValueError(f"data.source={config.source!r}: no such file or directory; expected {expected}")
    if not root.lower().endswith(SUFFIXES):
        raise ValueError(f"data.source={config.source!r}: a file of no known ending; expected {expected}")
    try:
        files = [_source_file(os.path.dirname(root), root)]
    except OSError as error:
        raise ValueError(
            f"data.source={config.source!r}: {error.filename} cannot be read ({error.strerror})"
        ) from error
    _check_parquet(files, config)
    return files


def is_text(file: SourceFile) -> bool:
    """A file of text, not of records."""
    return not file.path.lower().endswith((*LINE_SUFFIXES, PARQUET_SUFFIX))


def is_parquet(file: SourceFile) -> bool:
    """A file of rows."""
    return file.path.lower().endswith(PARQUET_SUFFIX)


def is_one_text(files: list[SourceFile], config: DataConfig) -> bool:
    """The source is one file of text: it is split by position, because there are no names to share out."""
    return len(files) == 1 and is_text(files[0]) and config.source != PYTHON_STDLIB


def say_once(message: str) -> None:
    """Logs a warning; both splits are looked for in the same files, and one word about them is enough."""
    if message not in _said:
        _said.add(message)
        _logger.warning("%s", message)


def _walk_openly(root: str, config: DataConfig) -> list[SourceFile]:
    """`_walk` by the rules above, which says what it passes over."""
    passed: list[str] = []
    hidden: list[str] = []
    files = _walk(root, SUFFIXES, set(), config, passed, hidden)
    others = [file for file in files if not (_is_unsure(file) and not _holds_json_lines(file, config))]
    no_lines = len(files) - len(others)
    parts = [f"{count} {ending}" for ending, count in _endings(passed)]
    parts += [f"{no_lines} .json without {config.feature!r} (data.feature) in its first line"] if no_lines else []
    parts += [f"{len(hidden)} hidden or system names, as {hidden[0]}"] if hidden else []
    if not others:
        found = f"; it holds {', '.join(parts)}" if parts else ""
        raise ValueError(
            f"data.source={config.source!r}: {root} holds no file that ends in {', '.join(SUFFIXES)}{found}"
        )
    _check_parquet(others, config)
    if parts:
        say_once(f"data.source={config.source!r}: passed over: {', '.join(parts)}; {len(others)} files are read")
    return others


def _walk(
    root: str,
    suffixes: tuple[str, ...],
    skipped: set[str],
    config: DataConfig,
    passed: list[str] | None = None,
    hidden: list[str] | None = None,
) -> list[SourceFile]:
    """Files below `root` by ending; with the two lists by any spelling of it, and the others' names go there."""
    openly = passed is not None and hidden is not None
    files, entered = [], set()
    try:
        for folder, subfolders, names in os.walk(root, onerror=_raise, followlinks=True):
            identity = os.stat(folder)
            if (identity.st_dev, identity.st_ino) in entered:
                subfolders.clear()
                continue
            entered.add((identity.st_dev, identity.st_ino))
            if openly:
                hidden += [os.path.join(folder, name) for name in (*subfolders, *names) if _is_hidden(name)]
                subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
                names = [name for name in names if not _is_hidden(name)]
                passed += [name for name in names if not name.lower().endswith(suffixes)]
            subfolders[:] = sorted(set(subfolders) - skipped)
            chosen = [name for name in names if (name.lower() if openly else name).endswith(suffixes)]
            for path in (os.path.join(folder, name) for name in chosen):
                try:
                    files.append(_source_file(root, path))
                except OSError as error:
                    if config.on_damage == "fail":
                        raise
                    _logger.warning("%s: left out, because it cannot be read (%s)", path, error.strerror)
    except OSError as error:
        raise ValueError(
            f"data.source={config.source!r}: {error.filename} cannot be read ({error.strerror})"
        ) from error
    if not files and not openly:
        raise ValueError(f"data.source={config.source!r}: {root} holds no file that ends in {', '.join(suffixes)}")
    return sorted(files, key=lambda file: file.name)


def _check_parquet(files: list[SourceFile], config: DataConfig) -> None:
    count = sum(map(is_parquet, files))
    if count and importlib.util.find_spec("pyarrow") is None:
        raise NotImplementedError(
            f"data.source={config.source!r}: to read its {count} .parquet files takes pyarrow: "
            'python -m pip install "moda-jax[parquet]"'
        )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_NAMES


def _endings(names: Iterable[str]) -> list[tuple[str, int]]:
    """Endings and how many names have each, most first; a compressed file's with the ending before it."""
    counts: collections.Counter[str] = collections.Counter()
    for name in names:
        stem, ending = os.path.splitext(name)
        if ending.lower() in _COMPRESSIONS:
            ending = os.path.splitext(stem)[1] + ending
        counts[ending or "without ending"] += 1
    return counts.most_common()


def _is_unsure(file: SourceFile) -> bool:
    return file.path.lower().endswith(_UNSURE_SUFFIXES)


def _holds_json_lines(file: SourceFile, config: DataConfig) -> bool:
    """Whether a .json file's first line is an object with the text field. A damaged file is kept, to be named later."""
    try:
        with open(file.path, "rb") as raw:
            lines = gzip.GzipFile(fileobj=raw) if file.path.lower().endswith(".gz") else raw
            line = lines.readline(config.max_document_bytes + 1)
    except (OSError, EOFError, zlib.error):
        return True
    if not line.strip() or len(line) > config.max_document_bytes or is_lfs_pointer(line):
        return True
    try:
        record = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and config.feature in record


def _source_file(root: str, path: str) -> SourceFile:
    """A file's entry. Only regular files: opening a pipe would wait for ever."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    name = os.fsencode(os.path.relpath(path, root or ".")).replace(os.fsencode(os.sep), b"/")
    return SourceFile(path, name, status.st_size, status.st_mtime_ns)


def _raise(error: OSError) -> None:
    """os.walk passes over folders that it cannot read; a corpus must not."""
    raise error
