"""Tokenizers: bytes (built in) and Hugging Face tokenizer.json files, behind one small interface.

    python -m moda_jax.data.tokenizer train --vocab-size=8192 --output=tokenizer.json [--source=python_stdlib]

trains a byte-level BPE on the train split of a text source (see `moda_jax.data.train_tokenizer`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer as Backend

from moda_jax.config import DataConfig
from moda_jax.data.damage import DamageError, is_lfs_pointer
from moda_jax.data.tokenizer_file import LossCounter, Losses, settle, unknown_id, without_token
from moda_jax.paths import expand_home

_logger = logging.getLogger(__name__)

END_OF_TEXT_NAMES = ("<|endoftext|>", "</s>", "<eos>")


class Tokenizer(Protocol):
    """What the data pipeline and text generation need of a tokenizer.

    Attributes:
        vocab_size: token ids are 0..vocab_size-1.
        end_of_text_id: the token that ends a document.
        fingerprint: equal for tokenizers that give the same tokens, on any machine.
        needs_utf8: bytes that are not UTF-8 would come back as others.
        hides_end_of_text: the file's own rules would find the end-of-text token in text; they are changed for that.
    """

    vocab_size: int
    end_of_text_id: int
    fingerprint: str
    needs_utf8: bool
    hides_end_of_text: bool

    def encode(self, text: str | bytes) -> np.ndarray:
        """The text's tokens, int32 [n]. No end-of-text is added, and none comes out of any text.

        Raises:
            DamageError: text that the tokenizer has no tokens for.
        """
        ...

    def encode_batch(self, documents: Sequence[bytes]) -> tuple[list[np.ndarray], Losses]:
        """Tokens of each document, as `encode` gives them, and what was lost on the way.

        Raises:
            DamageError: as `encode`, for any of the documents.
        """
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The tokens' text; bytes that are not UTF-8 become U+FFFD, an end-of-text token its name."""
        ...


class ByteTokenizer:
    """One token per byte, 256 for end-of-text. Any bytes pass unchanged, valid UTF-8 or not."""

    vocab_size = 257
    end_of_text_id = 256
    fingerprint = "bytes-257"
    needs_utf8 = False
    hides_end_of_text = False

    def encode(self, text: str | bytes) -> np.ndarray:
        """The text's bytes, int32 [n]; a str is encoded as UTF-8."""
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def encode_batch(self, documents: Sequence[bytes]) -> tuple[list[np.ndarray], Losses]:
        """Each document's bytes, uint8 [n]; nothing is ever lost."""
        return [np.frombuffer(document, np.uint8) for document in documents], Losses()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids in 0..256.

        Raises:
            ValueError: an id outside of the vocabulary.
        """
        ids = _checked_ids(ids, self.vocab_size)
        pieces = np.split(ids, np.flatnonzero(ids == self.end_of_text_id))  # each piece but the first starts with it
        texts = [piece[piece < 256].astype(np.uint8).tobytes().decode("utf-8", "replace") for piece in pieces]
        return END_OF_TEXT_NAMES[0].join(texts)


class HuggingFaceTokenizer:
    """A tokenizer.json, read with the `tokenizers` library.

    Tokens are a function of the text: post-processing, padding, truncation and drawing by chance (BPE dropout, Unigram
    sampling) that the file may ask for are not applied. Text that spells a special token is encoded as ordinary text.
    Where the file's rules find the end-of-text token in text all the same (an ordinary piece of the vocabulary, an
    added token that is not special, the unknown token), that text is encoded by the same rules without this token: a
    document cannot hold a false end-of-text.

    Args:
        path: the tokenizer.json.
        end_of_text: the token that ends a document; None: the first of END_OF_TEXT_NAMES that the file has.

    Attributes:
        path: as given, "~" expanded.

    Raises:
        ValueError: no such file, not a tokenizer.json, or no end-of-text token.
    """

    needs_utf8 = True

    def __init__(self, path: str | Path, end_of_text: str | None = None):
        path = expand_home(path, "data.tokenizer")
        if not path.is_file():
            kind = "is a directory" if path.is_dir() else "no such file"
            raise ValueError(f'data.tokenizer={str(path)!r}: {kind}; expected "bytes" or the path of a tokenizer.json')
        content = path.read_bytes()
        if is_lfs_pointer(content):
            raise ValueError(
                f"data.tokenizer={str(path)!r}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
            )
        try:
            self._backend = Backend.from_buffer(content)
        except Exception as error:  # `tokenizers` raises bare Exceptions; this one speaks of this file's content only
            raise ValueError(f"data.tokenizer={str(path)!r}: not a tokenizer.json ({error})") from error
        drawn = settle(self._backend)
        if drawn:
            _logger.warning(
                "data.tokenizer=%r: draws its tokens by chance (%s); switched off, so that equal text has equal tokens",
                str(path), ", ".join(drawn),
            )  # fmt: skip
        names = END_OF_TEXT_NAMES if end_of_text is None else (end_of_text,)
        ids = [self._backend.token_to_id(name) for name in names]
        known = [i for i in ids if i is not None]
        if not known:
            field = "data.end_of_text" if end_of_text is not None else "data.tokenizer"
            raise ValueError(
                f"{field}: {str(path)!r} has none of the end-of-text tokens {', '.join(map(repr, names))}; "
                "set data.end_of_text to the token that ends its documents"
            )
        self.end_of_text_id: int = known[0]
        self.path, self._settings = path, json.loads(content)
        self._guarded: Backend | None = None  # made when the first text needs it
        unknown = unknown_id(self._settings, self._backend)
        self._unknown_id = None if unknown == self.end_of_text_id else unknown  # text never gives that one
        self._losses = LossCounter(self._settings, self._backend, has_unknown=self._unknown_id is not None)
        name = self._backend.id_to_token(self.end_of_text_id)
        self.hides_end_of_text = any(self._holds_end(text) for text in (name, f"a{name}a", f"a {name} a", "\U0010fffe"))
        # Ids may have holes, so the number of tokens is not enough.
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        digest = hashlib.blake2b(content, digest_size=16)
        digest.update(self.end_of_text_id.to_bytes(8, "little"))
        self.fingerprint = f"tokenizer.json-{digest.hexdigest()}"

    def encode(self, text: str | bytes) -> np.ndarray:
        """The text's tokens, int32 [n]; bytes that are not UTF-8 are replaced by U+FFFD.

        Raises:
            DamageError: text that the vocabulary lacks, and no usable unknown token.
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._encode([text], with_losses=False)[0][0]

    def encode_batch(self, documents: Sequence[bytes]) -> tuple[list[np.ndarray], Losses]:
        """Each document's tokens, int32 [n], on all cores, and what was lost.

        Raises:
            DamageError: as `encode`, for any of the documents.
        """
        texts, replaced = [], 0
        for document in documents:
            try:
                texts.append(document.decode("utf-8"))
            except UnicodeDecodeError:
                texts.append(document.decode("utf-8", "replace"))
                replaced += 1
        tokens, losses = self._encode(texts, with_losses=True)
        return tokens, losses + Losses(replaced_documents=replaced)

    def _encode(self, texts: list[str], *, with_losses: bool) -> tuple[list[np.ndarray], Losses]:
        with_losses &= self._losses.needed
        encode = self._backend.encode_batch if with_losses else self._backend.encode_batch_fast
        encodings = self._try(encode, texts, add_special_tokens=False)
        tokens, losses = [], Losses()
        for text, encoding in zip(texts, encodings, strict=True):
            ids = np.asarray(encoding.ids, np.int32)
            if (ids == self.end_of_text_id).any():
                encoding = self._try(self._without_end().encode, text, add_special_tokens=False)
                ids = np.asarray(encoding.ids, np.int32)
                if (ids == self.end_of_text_id).any():
                    raise DamageError(f"data.tokenizer={str(self.path)!r}: text gives its end-of-text token")
            tokens.append(ids)
            if with_losses:
                losses += self._losses.count(text, encoding)
            if self._unknown_id is not None:
                losses += Losses(unknown_tokens=int((ids == self._unknown_id).sum()))
        return tokens, losses

    def _try[Result](self, encode: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        try:
            return encode(*arguments, **options)
        except Exception as error:  # `tokenizers` raises bare Exceptions; here only for text that it has no token for
            raise DamageError(
                f"data.tokenizer={str(self.path)!r}: cannot encode a text ({error}); a tokenizer whose vocabulary "
                "does not cover every text needs an unknown token that is in the vocabulary"
            ) from error

    def _without_end(self) -> Backend:
        if self._guarded is None:
            name = self._backend.id_to_token(self.end_of_text_id)
            try:
                self._guarded = without_token(self._settings, name)
            except ValueError as error:
                raise DamageError(
                    f"data.tokenizer={str(self.path)!r}: text gives its end-of-text token, and the file {error}; "
                    "name a token in data.end_of_text that no text gives"
                ) from error
        return self._guarded

    def _holds_end(self, text: str) -> bool:
        """Whether the file's own rules find the end-of-text token in a text."""
        try:
            return self.end_of_text_id in self._try(self._backend.encode, text, add_special_tokens=False).ids
        except DamageError:
            return False

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The tokens' text, special tokens by their names.

        Raises:
            ValueError: an id outside of the vocabulary.
        """
        return self._backend.decode(_checked_ids(ids, self.vocab_size).tolist(), skip_special_tokens=False)


def load_tokenizer(config: DataConfig, carried: Path | None = None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Args:
        config: the data section.
        carried: where a run keeps a copy of its tokenizer.json. If the file is there, it is the tokenizer: the one at
            `data.tokenizer` may have been moved or changed since.

    Raises:
        ValueError: see `HuggingFaceTokenizer`; or `data.end_of_text` beside the bytes tokenizer, which has its own.
    """
    if config.tokenizer == "bytes":
        if config.end_of_text is not None:
            raise ValueError(
                f'data.end_of_text={config.end_of_text!r}: expected None with data.tokenizer="bytes", which ends '
                "documents with its own token 256"
            )
        return ByteTokenizer()
    if carried is None or not carried.is_file():
        return HuggingFaceTokenizer(config.tokenizer, config.end_of_text)
    original = Path(os.path.expanduser(config.tokenizer))  # may be gone, its home directory too
    if original.is_file() and original.read_bytes() != carried.read_bytes():
        _logger.warning(
            "data.tokenizer=%r: has changed since the run began; the run goes on with its own copy, %s",
            config.tokenizer, carried,
        )  # fmt: skip
    return HuggingFaceTokenizer(carried, config.end_of_text)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, config: DataConfig) -> None:
    """Checks that the model has a row for every token.

    Raises:
        ValueError: the tokenizer's vocabulary is larger than the model's.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size}: expected at least {tokenizer.vocab_size}, the vocabulary of "
            f"data.tokenizer={config.tokenizer!r}"
        )


def _checked_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids as an int64 array, all inside the vocabulary."""
    ids = np.asarray(ids, np.int64).reshape(-1)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"ids: came {ids.min()}..{ids.max()}, expected 0..{vocab_size - 1}")
    return ids
