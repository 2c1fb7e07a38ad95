"""A real corpus that every machine with this project has: the Python source of its installed packages.

    python -m benchmarks.python_corpus DIRECTORY [--megabytes=200]

Writes DIRECTORY/part-NNN.jsonl.gz, a file's text per line, each text once. Files are taken in a fixed pseudo-random
order (a hash of their path), so that a smaller corpus is a sample of a larger one; which packages are installed decides
what there is to take. Use it as `--config.data.source=DIRECTORY`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PART_BYTES = 16 * 2**20
SHORTEST_BYTES = 500


def source_files() -> list[Path]:
    """The .py files of the standard library and of the installed packages, in hash order of their relative path."""
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    files = {path.relative_to(root): path for root in sorted(roots) for path in root.rglob("*.py")}
    return [files[key] for key in sorted(files, key=lambda key: hashlib.sha256(str(key).encode()).digest())]


def documents(limit_bytes: int) -> Iterator[str]:
    """Texts of at least `SHORTEST_BYTES`, each once, until their UTF-8 bytes reach the limit."""
    seen: set[bytes] = set()
    total = 0
    for path in source_files():
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if len(content) < SHORTEST_BYTES or digest in seen:
            continue
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue  # an old source encoding: not what this corpus is about
        seen.add(digest)
        yield text
        total += len(content)
        if total >= limit_bytes:
            return


def parts(texts: Iterator[str]) -> Iterator[list[str]]:
    """The texts in lists of about `PART_BYTES`."""
    part: list[str] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text.encode())
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def write(directory: Path, limit_bytes: int) -> tuple[int, int]:
    """Writes the parts; returns (documents, bytes)."""
    directory.mkdir(parents=True, exist_ok=True)
    count = total = 0
    for number, part in enumerate(parts(documents(limit_bytes))):
        with gzip.open(directory / f"part-{number:03d}.jsonl.gz", "wt", encoding="utf-8", compresslevel=1) as out:
            for text in part:
                out.write(json.dumps({"text": text}) + "\n")
                total += len(text.encode())
        count += len(part)
    return count, total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Writes the Python source of the installed packages as a corpus.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--megabytes", type=float, default=200)
    arguments = parser.parse_args()
    count, total = write(arguments.directory, int(arguments.megabytes * 1e6))
    print(f"{arguments.directory}: {count} documents, {total / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
