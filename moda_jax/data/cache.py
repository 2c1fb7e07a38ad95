"""The cache directory, and things in it that are made once.

A thing is a directory. It is made under another name and renamed when complete, so whoever sees it sees all of it.
Makers hold a file lock that the kernel drops when they die, so neither a second process nor a killed one does harm.
Things are named by what they were made from, so a changed source gets a new one; old ones stay until a person deletes
them, which is safe whenever nobody is reading.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moda_jax.config import DataConfig, check_local
from moda_jax.paths import expand_home

_logger = logging.getLogger(__name__)


def cache_directory(config: DataConfig) -> Path:
    """`data.cache_dir`, or moda_jax in the user's cache directory (XDG_CACHE_HOME, else ~/.cache).

    Raises:
        ValueError: it cannot be created or written.
    """
    if config.cache_dir is not None:
        directory = expand_home(config.cache_dir, "data.cache_dir").absolute()
    else:
        check_local("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME", ""))
        try:
            caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        except RuntimeError as error:
            raise ValueError(
                f"data.cache_dir=None: user {os.getuid()} has no home directory to keep a cache in; set "
                "data.cache_dir, or the variable XDG_CACHE_HOME or HOME"
            ) from error
        directory = caches.absolute() / "moda_jax"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK | os.X_OK)
    except OSError as error:
        raise ValueError(f"data.cache_dir={str(directory)!r}: cannot be created ({error})") from error
    if not writable:
        raise ValueError(f"data.cache_dir={str(directory)!r}: no permission to write there")
    return directory


def cache_key(**facts: Any) -> str:
    """A short name for facts (anything that JSON can hold): equal facts, equal name."""
    canonical = json.dumps(facts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=12).hexdigest()


def prepare_once(directory: Path, prepare: Callable[[Path], None], what: str) -> Path:
    """Makes `directory` unless it is there.

    Args:
        directory: the finished thing.
        prepare: fills the empty directory that it is given; runs in one process at a time.
        what: the thing in words, for messages.

    Returns:
        `directory`.
    """
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(directory.with_name(directory.name + ".lock"), what):
        if directory.is_dir():  # another process made it while we waited
            return directory
        incomplete = directory.with_name(directory.name + ".incomplete")
        if incomplete.exists():  # we hold the lock: whoever made it is dead
            _logger.warning("%s: removing what an interrupted process left, %s", what, incomplete)
            shutil.rmtree(incomplete)
        incomplete.mkdir()
        try:
            prepare(incomplete)
            _flush(incomplete)
            incomplete.rename(directory)
        except BaseException:  # KeyboardInterrupt too: leave nothing half-made behind
            shutil.rmtree(incomplete, ignore_errors=True)
            raise
    return directory


@contextmanager
def _exclusive(path: Path, what: str) -> Iterator[None]:
    """Holds a lock on `path`; waits, and says so, while another process has it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.warning("%s: another process is preparing this; waiting for it (lock %s)", what, path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file drops the lock; the file stays, for removing it would race with the next process


def _flush(directory: Path) -> None:
    """Puts a directory's files on disk before the rename that declares them complete."""
    for root, _, names in os.walk(directory):
        for path in (root, *(os.path.join(root, name) for name in names)):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
