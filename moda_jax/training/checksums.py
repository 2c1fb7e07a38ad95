"""Checksums of every file in a directory: a manifest that is written once, and checked before the files are trusted.

    CHECKSUMS    line 1: JSON, the files with their sizes and the SHA-256 of each piece; line 2: the SHA-256 of line 1

A file is cut into pieces that are hashed in parallel threads (hashing and reading release the GIL), so one large file
is as quick as many small ones.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST_FILE = "CHECKSUMS"
_FORMAT = 1
_PIECE_BYTES = 2**26
_READ_BYTES = 2**20
_MOST_THREADS = 16


def write_manifest(directory: Path) -> None:
    """Writes the manifest of all files below `directory`, in one step, and puts them and it on disk.

    Raises:
        OSError: a file cannot be read or the manifest not be written.
    """
    names = sorted(_files(directory))
    files: dict[str, dict[str, Any]] = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": []} for name in names
    }
    pieces = [(name, number) for name in names for number in range(_piece_count(files[name]["bytes"], _PIECE_BYTES))]
    with _threads() as pool:
        for _ in pool.map(lambda name: flush(directory / name), names):
            pass
        digests = pool.map(lambda piece: _piece_digest(directory / piece[0], piece[1], _PIECE_BYTES), pieces)
        for (name, _), digest in zip(pieces, digests, strict=True):
            files[name]["sha256"].append(digest)
    content = json.dumps({"format": _FORMAT, "piece_bytes": _PIECE_BYTES, "files": files}, sort_keys=True)
    temporary = directory / f"{MANIFEST_FILE}.new"
    temporary.write_text(f"{content}\n{_text_digest(content)}\n", encoding="ascii")
    flush(temporary)
    temporary.replace(directory / MANIFEST_FILE)
    for folder, _, _ in os.walk(directory):
        flush(Path(folder))


def find_damage(directory: Path) -> list[str]:
    """What is wrong with the files below `directory`, a line for each; nothing means that every bit is as written.

    Files that the manifest does not name are not looked at: nothing refers to them.
    """
    try:
        manifest = _read_manifest(directory)
    except ManifestError as error:
        return [str(error)]
    damage, pieces = {}, []
    for name, entry in manifest["files"].items():
        try:
            size = (directory / name).stat().st_size
        except OSError as error:
            damage[name] = f"{name}: {'missing' if isinstance(error, FileNotFoundError) else error.strerror}"
            continue
        if size != entry["bytes"]:
            damage[name] = f"{name}: has {size} bytes, was written with {entry['bytes']}"
            continue
        pieces += [(name, number, digest) for number, digest in enumerate(entry["sha256"])]

    def check(piece: tuple[str, int, str]) -> str | None:
        name, number, expected = piece
        try:
            digest = _piece_digest(directory / name, number, manifest["piece_bytes"])
        except OSError as error:
            return f"{name}: cannot be read ({error.strerror})"
        first = number * manifest["piece_bytes"]
        return None if digest == expected else f"{name}: its content has changed (in the piece from byte {first} on)"

    with _threads() as pool:
        for (name, *_), problem in zip(pieces, pool.map(check, pieces), strict=True):
            if problem is not None:
                damage.setdefault(name, problem)
    return [damage[name] for name in sorted(damage)]


def total_bytes(directory: Path) -> int:
    """Bytes of the files below `directory`."""
    return sum((directory / name).stat().st_size for name in _files(directory))


class ManifestError(ValueError):
    """There is no manifest, or it is damaged itself."""


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        text = (directory / MANIFEST_FILE).read_bytes().decode("ascii")
    except FileNotFoundError as error:
        raise ManifestError(f"{MANIFEST_FILE} missing") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{MANIFEST_FILE}: cannot be read ({error})") from error
    content, _, rest = text.partition("\n")
    if rest != f"{_text_digest(content)}\n":
        raise ManifestError(f"{MANIFEST_FILE}: its content has changed")
    manifest = json.loads(content)
    if manifest["format"] != _FORMAT:
        raise ManifestError(f"{MANIFEST_FILE}: format {manifest['format']}, this version reads {_FORMAT}")
    return manifest


def _files(directory: Path) -> Iterator[str]:
    """Names relative to `directory`, with "/", of all files below it but the manifest."""
    for folder, _, names in os.walk(directory):
        for name in names:
            relative = (Path(folder) / name).relative_to(directory).as_posix()
            if relative not in (MANIFEST_FILE, f"{MANIFEST_FILE}.new"):
                yield relative


def _piece_count(num_bytes: int, piece_bytes: int) -> int:
    return -(-num_bytes // piece_bytes)


def _piece_digest(path: Path, number: int, piece_bytes: int) -> str:
    """SHA-256 of a file's bytes from number * piece_bytes on."""
    digest, left, buffer = hashlib.sha256(), piece_bytes, memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(number * piece_bytes)
        while left > 0:
            count = file.readinto(buffer[: min(left, _READ_BYTES)])
            if not count:
                break
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def flush(path: Path) -> None:
    """Puts a file, or the names in a directory, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0))))
