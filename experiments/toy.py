"""The toy's text: a few modules of Python's standard library, three of whose packages are the "sources"."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

SOURCES = ("json", "email", "logging")
HELD_OUT = "unittest"
_LINES = 60  # of a document
_HELD_OUT_DOCUMENTS = 12


def write_toy_corpus(directory: Path) -> Path:
    """Writes train/ and held_out/ unless they are there; returns `directory`."""
    for folder, packages in (("train", SOURCES), ("held_out", (HELD_OUT,))):
        path = directory / folder / "toy.jsonl"
        if path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [record for name in packages for record in _documents(name)]
        records = records[:_HELD_OUT_DOCUMENTS] if folder == "held_out" else records
        temporary = path.with_suffix(".new")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
        temporary.rename(path)
    return directory


def _documents(package: str) -> list[dict[str, str]]:
    root = Path(sysconfig.get_path("stdlib")) / package
    documents = []
    for path in sorted(root.glob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        documents += [{"source": package, "text": "".join(lines[i : i + _LINES])} for i in range(0, len(lines), _LINES)]
    return documents
