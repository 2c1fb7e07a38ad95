"""A split as one flat array of tokens on disk, made once and read where it is wanted: any row, any length.

The directory of a split holds:

    tokens.npy     [N] uint16 when the vocabulary fits, else uint32: every document's tokens, then its end-of-text
    offsets.npy    [documents + 1] int64: document d is tokens[offsets[d]:offsets[d + 1]]
    meta.json      counts and the fingerprint
    skipped.jsonl  documents that were left out, by name; no such file: none was
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from moda_jax.config import DataConfig
from moda_jax.data.cache import prepare_once
from moda_jax.data.damage import DamageError, SkippedDocuments, log_skipped, read_skipped
from moda_jax.data.file_array import FileArray
from moda_jax.data.file_guard import FileGuard
from moda_jax.data.packing import count_rows
from moda_jax.data.tokenizer import Tokenizer
from moda_jax.data.tokenizer_file import Losses
from moda_jax.progress import progress_bar

_logger = logging.getLogger(__name__)

TOKENS_VERSION = 2  # of the files below; a change of it tokenises everything anew

# Documents tokenised together: enough to keep all cores busy, few enough to hold in memory.
_CHUNK_DOCUMENTS, _CHUNK_BYTES = 256, 2**22


class DocumentSource(Protocol):
    """Documents by position: text as bytes, or (holds_tokens) token ids as integer arrays [n].

    Reading one that is damaged raises DamageError.
    """

    holds_tokens: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes | np.ndarray: ...

    def name_of(self, index: int) -> str:
        """For messages."""
        ...


@dataclasses.dataclass(frozen=True)
class TokenDataset:
    """A tokenised split.

    Attributes:
        tokens: uint16 or uint32 [N], in its file.
        offsets: int64 [num_documents + 1], in its file.
        fingerprint: depends on the tokens, the documents' bounds and the tokenizer alone, so equal data has equal
            fingerprints on any machine.
        name: the split in words, for messages.
        guard: notices changes of the files.
    """

    tokens: FileArray
    offsets: FileArray
    fingerprint: str
    name: str
    guard: FileGuard | None = None

    @property
    def num_tokens(self) -> int:
        """N: all tokens, end-of-text included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents that are not empty."""
        return len(self.offsets) - 1

    def num_rows(self, sequence_length: int) -> int:
        """Rows of an epoch at T = `sequence_length`."""
        return count_rows(self.num_tokens, sequence_length)


def prepare_tokens(
    directory: Path,
    open_documents: Callable[[], DocumentSource],
    tokenizer: Tokenizer,
    name: str,
    skipped: SkippedDocuments | None = None,
) -> TokenDataset:
    """Opens the tokenised split in `directory`; makes it first if it is not there.

    Args:
        directory: its place in the cache.
        open_documents: opens the documents; called only if they must be tokenised.
        tokenizer: encodes text, and ends every document.
        name: the split in words, for messages.
        skipped: says what may be left out, and is told; None: as `DataConfig` has it by default.

    Raises:
        DamageError: a document that cannot be used, and may not be left out.
        ValueError: token ids outside of the tokenizer's vocabulary; or the directory holds something else.
    """
    skipped = SkippedDocuments(DataConfig()) if skipped is None else skipped
    prepare_once(directory, lambda new: _write(new, open_documents(), tokenizer, name, skipped), f"Tokens of {name}")
    log_skipped(name, directory, read_skipped(directory))
    return _opened(directory, json.loads((directory / "meta.json").read_text()), name)


def open_tokens(directory: Path, tokenizer: Tokenizer) -> TokenDataset:
    """Opens a split that `prepare_tokens` made, maybe on another machine.

    Raises:
        ValueError: no such directory, it holds something else, or another tokenizer made the tokens.
    """
    directory = directory.expanduser()
    try:
        meta = json.loads((directory / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"data.source: {directory} holds no prepared tokens ({error})") from error
    if meta["tokenizer"] != tokenizer.fingerprint:
        raise ValueError(
            f"data.tokenizer: is not the tokenizer that made the tokens in {directory} ({tokenizer.fingerprint}, "
            f"theirs is {meta['tokenizer']})"
        )
    return _opened(directory, meta, meta["name"])


def _opened(directory: Path, meta: dict, name: str) -> TokenDataset:
    """The arrays of a finished directory."""
    losses = Losses(**meta.get("losses", {}))
    if losses != Losses():
        _logger.warning("%s: the tokenizer lost text: %s (of %d tokens)", name, losses, meta["num_tokens"])
    tokens, offsets = FileArray(directory / "tokens.npy"), FileArray(directory / "offsets.npy")
    if len(tokens) != meta["num_tokens"] or len(offsets) != meta["num_documents"] + 1:
        raise ValueError(f"{directory}: the arrays do not have the lengths in meta.json; delete the directory")
    guard = FileGuard(directory / "tokens.npy", directory / "offsets.npy")
    return TokenDataset(tokens=tokens, offsets=offsets, fingerprint=meta["fingerprint"], name=name, guard=guard)


def _write(
    directory: Path, documents: DocumentSource, tokenizer: Tokenizer, name: str, skipped: SkippedDocuments
) -> None:
    """Tokenises all documents into the three files."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    end_of_text = np.array([tokenizer.end_of_text_id], dtype)
    digest = hashlib.blake2b(tokenizer.fingerprint.encode(), digest_size=16)
    offsets = array.array("q", [0])
    skipped.reasons.update(getattr(documents, "skipped", {}))
    losses: list[Losses] = []
    with (directory / "tokens.npy").open("wb") as file:
        _write_header(file, 0, dtype)
        for encoded in _encode(documents, tokenizer, name, skipped, losses):
            pieces = [np.zeros(0, dtype)]
            for document in encoded:
                if len(document) == 0:  # a tokenizer that makes nothing of something
                    continue
                pieces.append(document)
                if document[-1] != tokenizer.end_of_text_id:  # a token feature may bring its own
                    pieces.append(end_of_text)
                offsets.append(offsets[-1] + len(document) + (pieces[-1] is end_of_text))
            block = np.concatenate(pieces, dtype=dtype, casting="unsafe")  # all ids are inside the vocabulary
            file.write(block.data)
            digest.update(block.data)
        _write_header(file, offsets[-1], dtype)
    bounds = np.asarray(offsets, "<i8")
    np.save(directory / "offsets.npy", bounds)
    digest.update(bounds.data)
    meta = {
        "name": name,
        "num_tokens": offsets[-1],
        "num_documents": len(offsets) - 1,
        "num_skipped_documents": len(skipped.reasons),
        "losses": dataclasses.asdict(sum(losses, Losses())),
        "tokenizer": tokenizer.fingerprint,
        "fingerprint": digest.hexdigest(),
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=1))
    skipped.write(directory)
    _logger.info("%s: %d documents, %d tokens", name, len(offsets) - 1, offsets[-1])


def _encode(
    documents: DocumentSource, tokenizer: Tokenizer, name: str, skipped: SkippedDocuments, losses: list[Losses]
) -> Iterator[list[np.ndarray]]:
    """Chunks of tokenised documents, with a progress bar."""
    with progress_bar(total=len(documents), unit=" documents", desc=f"Tokenizing {name}") as bar:
        chunk, size = {}, 0
        for index in range(len(documents)):
            document = _document(documents, index, tokenizer, name, skipped)
            if document is not None:
                chunk[index] = document
                size += len(document)
            if len(chunk) == _CHUNK_DOCUMENTS or size >= _CHUNK_BYTES or index == len(documents) - 1:
                if documents.holds_tokens:
                    for document in chunk.values():
                        _check_token_ids(document, tokenizer, name)
                    yield list(chunk.values())
                else:
                    yield _encode_chunk(documents, chunk, tokenizer, name, skipped, losses)
                bar.update(index + 1 - bar.n)
                chunk, size = {}, 0


def _encode_chunk(
    documents: DocumentSource, chunk: dict[int, bytes], tokenizer: Tokenizer, name: str, skipped: SkippedDocuments,
    losses: list[Losses],
) -> list[np.ndarray]:  # fmt: skip
    """The chunk's tokens; a document that the tokenizer has no tokens for is left out, where that is allowed."""
    try:
        encoded, lost = tokenizer.encode_batch(list(chunk.values()))
        losses.append(lost)
        return encoded
    except DamageError:  # does not say which one
        kept = []
    for index, document in chunk.items():
        try:
            (tokens,), lost = tokenizer.encode_batch([document])
            losses.append(lost)
            kept.append(tokens)
        except DamageError as error:
            document_name = documents.name_of(index)
            skipped.damaged(document_name, DamageError(f"{name}, document {document_name}: {error}"))
    return kept


def _document(
    documents: DocumentSource, index: int, tokenizer: Tokenizer, name: str, skipped: SkippedDocuments
) -> bytes | np.ndarray | None:
    """A document, or None if it is left out."""
    try:
        document = documents[index]
    except DamageError as error:
        skipped.damaged(documents.name_of(index), error)
        return None
    if len(document) == 0:
        skipped.empty(documents.name_of(index))
        return None
    if isinstance(document, bytes) and tokenizer.needs_utf8:
        try:
            document.decode("utf-8")
        except UnicodeDecodeError as error:
            skipped.not_utf8(documents.name_of(index), name, error)
            return None
    return document


def _check_token_ids(document: np.ndarray, tokenizer: Tokenizer, name: str) -> None:
    if len(document) and not 0 <= int(document.min()) <= int(document.max()) < tokenizer.vocab_size:
        raise ValueError(
            f"data.feature: {name} holds token ids {document.min()}..{document.max()}; data.tokenizer has "
            f"0..{tokenizer.vocab_size - 1}. Expected the tokenizer that made these tokens"
        )


def _write_header(file, num_tokens: int, dtype: np.dtype) -> None:
    """Writes the .npy header at the file's start; NumPy leaves room in it for a longer first axis."""
    file.seek(0)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_tokens,)}
    np.lib.format.write_array_header_1_0(file, header)
