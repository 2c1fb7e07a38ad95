"""Tokenizers: bytes (built in) and Hugging Face tokenizer.json files, behind one small interface.

    python -m moda_jax.data.tokenizer train --vocab-size=8192 --output=tokenizer.json [--source=python_stdlib]

trains a byte-level BPE on the train split of a text source (see `moda_jax.data.train_tokenizer`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from moda_jax.config import DataConfig

END_OF_TEXT_NAMES = ("<|endoftext|>", "</s>", "<eos>")


class Tokenizer(Protocol):
    """What the data pipeline and text generation need of a tokenizer.

    Attributes:
        vocab_size: token ids are 0..vocab_size-1.
        end_of_text_id: the token that ends a document.
        fingerprint: equal for tokenizers that give the same tokens, on any machine.
        needs_utf8: bytes that are not UTF-8 would come back as others.
    """

    vocab_size: int
    end_of_text_id: int
    fingerprint: str
    needs_utf8: bool

    def encode(self, text: str | bytes) -> np.ndarray:
        """The text's tokens, int32 [n]. No end-of-text is added, and none comes out of text that spells its name."""
        ...

    def encode_batch(self, documents: Sequence[bytes]) -> tuple[list[np.ndarray], int]:
        """Tokens of each document, and how many documents had invalid UTF-8 replaced by U+FFFD."""
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

    def encode(self, text: str | bytes) -> np.ndarray:
        """The text's bytes, int32 [n]; a str is encoded as UTF-8."""
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def encode_batch(self, documents: Sequence[bytes]) -> tuple[list[np.ndarray], int]:
        """Each document's bytes, uint8 [n]; never a replacement."""
        return [np.frombuffer(document, np.uint8) for document in documents], 0

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

    Post-processing, padding and truncation that the file may ask for are not applied. Text that spells a special token
    is encoded as ordinary text, so a document cannot hold a false end-of-text.

    Args:
        path: the tokenizer.json.
        end_of_text: the token that ends a document; None: the first of END_OF_TEXT_NAMES that the file has.

    Raises:
        ValueError: no such file, not a tokenizer.json, or no end-of-text token.
    """

    needs_utf8 = True

    def __init__(self, path: str | Path, end_of_text: str | None = None):
        from tokenizers import Tokenizer as Backend

        path = Path(path).expanduser()
        if not path.is_file():
            kind = "is a directory" if path.is_dir() else "no such file"
            raise ValueError(f'data.tokenizer={str(path)!r}: {kind}; expected "bytes" or the path of a tokenizer.json')
        content = path.read_bytes()
        try:
            self._backend = Backend.from_buffer(content)
        except Exception as error:  # `tokenizers` raises bare Exceptions; this one speaks of this file's content only
            raise ValueError(f"data.tokenizer={str(path)!r}: not a tokenizer.json ({error})") from error
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
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
        # Ids may have holes, so the number of tokens is not enough.
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        digest = hashlib.blake2b(content, digest_size=16)
        digest.update(self.end_of_text_id.to_bytes(8, "little"))
        self.fingerprint = f"tokenizer.json-{digest.hexdigest()}"

    def encode(self, text: str | bytes) -> np.ndarray:
        """The text's tokens, int32 [n]; bytes that are not UTF-8 are replaced by U+FFFD."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return np.asarray(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, documents: Sequence[bytes]) -> tuple[list[np.ndarray], int]:
        """Each document's tokens, int32 [n], on all cores; and the number of documents that were not valid UTF-8."""
        texts, replaced = [], 0
        for document in documents:
            try:
                texts.append(document.decode("utf-8"))
            except UnicodeDecodeError:
                texts.append(document.decode("utf-8", "replace"))
                replaced += 1
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings], replaced

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The tokens' text, special tokens by their names.

        Raises:
            ValueError: an id outside of the vocabulary.
        """
        return self._backend.decode(_checked_ids(ids, self.vocab_size).tolist(), skip_special_tokens=False)


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

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
    return HuggingFaceTokenizer(config.tokenizer, config.end_of_text)


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


if __name__ == "__main__":
    from moda_jax.data.train_tokenizer import main

    raise SystemExit(main())
