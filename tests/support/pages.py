"""README and the pages in docs/: their texts, their Python blocks and their commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted((ROOT / "docs").glob("*.md"))
]  # fmt: skip
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}


def python_blocks(text: str) -> list[str]:
    """As printed, in order."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The arguments after every `python` of a document: in code blocks, and between backquotes. The project's own
    commands are those of its scripts: "moda-train --workdir=RUN" is "train.py --workdir=RUN"."""
    text = text.replace("\\\n", " ").replace("moda-experiments ", "python -m experiments ")
    text = re.sub(r"\bmoda-(train|generate|evaluate) ", r"python \1.py ", text)
    found = re.findall(r"python ((?:-m [\w.]+|\w+\.py)(?:(?! && | \| )[^\n`])*)", text)
    split = []
    for command in found:
        command = re.sub(r"\s{2,}#.*", "", command.replace("$'", "'")).strip()
        if command.count('"') % 2:  # it ends the quoted argument of another command
            command = command.removesuffix('"')
        if not command.startswith("-m pip"):
            split.append(shlex.split(command))
    return split
