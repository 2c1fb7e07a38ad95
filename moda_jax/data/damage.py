"""Data that cannot be used as it is: refused at start, or left out with its name and the reason, as the config says."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from moda_jax.config import DataConfig

_logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped.jsonl"
_NAMES_IN_LOG = 5


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins so only points to its content: a clone without Git LFS leaves such files."""
    return head.startswith(_LFS_POINTER)


class DamageError(ValueError):
    """A document, or the rest of a file, that cannot be used; the message names it, and the config field."""


class SkippedDocuments:
    """What is left out of a source, by name.

    Args:
        config: `on_damage` and `on_invalid_utf8` say whether anything may be.

    Attributes:
        reasons: why, by the document's name.
    """

    def __init__(self, config: DataConfig, reasons: Mapping[str, str] | None = None):
        self._policies = {"damage": config.on_damage, "utf8": config.on_invalid_utf8}
        self.reasons: dict[str, str] = dict(reasons or {})

    def damaged(self, name: str, error: DamageError) -> None:
        """Leaves a damaged document out.

        Raises:
            DamageError: the same, where `data.on_damage` does not allow that.
        """
        self._skip("damage", name, error)

    def not_utf8(self, name: str, where: str, error: UnicodeDecodeError) -> None:
        """Leaves a document out that is no text for a tokenizer that needs text.

        Raises:
            DamageError: where `data.on_invalid_utf8` does not allow that.
        """
        message = f"data.on_invalid_utf8='fail': {where}, document {name}: not valid UTF-8 ({error.reason} at byte "
        self._skip("utf8", name, DamageError(f"{message}{error.start})"))

    def empty(self, name: str) -> None:
        """Notes an empty document; there is nothing in it to lose."""
        self.reasons[name] = "empty"

    def write(self, directory: Path) -> None:
        """Writes skipped.jsonl, a line per document; none if nothing was left out."""
        if self.reasons:
            lines = (json.dumps({"name": name, "reason": reason}) for name, reason in self.reasons.items())
            (directory / SKIPPED_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _skip(self, kind: str, name: str, error: DamageError) -> None:
        if self._policies[kind] == "fail":
            raise error
        self.reasons[name] = str(error)


def read_skipped(directory: Path) -> dict[str, str]:
    """What `SkippedDocuments.write` wrote there; nothing without such a file."""
    try:
        lines = (directory / SKIPPED_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    return {entry["name"]: entry["reason"] for entry in map(json.loads, lines)}


def log_skipped(name: str, directory: Path, reasons: Mapping[str, str]) -> None:
    """Says how many documents of `name` were left out, names some, and where all of them are named."""
    losses = {document: reason for document, reason in reasons.items() if reason != "empty"}
    if len(reasons) > len(losses):
        _logger.info("%s: %d empty documents skipped", name, len(reasons) - len(losses))
    if losses:
        some = "; ".join(f"{document}: {reason}" for document, reason in list(losses.items())[:_NAMES_IN_LOG])
        more = f"; and {len(losses) - _NAMES_IN_LOG} more" if len(losses) > _NAMES_IN_LOG else ""
        _logger.warning(
            "%s: %d DOCUMENTS LEFT OUT (all named in %s): %s%s", name, len(losses), directory / SKIPPED_FILE, some, more
        )
