"""Trains a byte-level BPE on the train split of a text source and writes a Hugging Face tokenizer.json.

Byte-level: every byte is in the vocabulary, so any text can be encoded and nothing is unknown. The token
"<|endoftext|>" ends documents.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import tokenizers

from moda_jax.config import DataConfig
from moda_jax.data.sources import find_split
from moda_jax.data.token_store import DocumentSource
from moda_jax.data.tokenizer import END_OF_TEXT_NAMES, HuggingFaceTokenizer
from moda_jax.paths import expand_home
from moda_jax.progress import progress_bar

_logger = logging.getLogger(__name__)

_MIN_VOCAB_SIZE = 257  # the bytes and the end-of-text token


def train_bpe(config: DataConfig, vocab_size: int, output: str | Path) -> HuggingFaceTokenizer:
    """Trains on the documents of the train split, with progress on stderr, and writes `output` when it is complete.

    Args:
        config: the source of the text.
        vocab_size: tokens, end-of-text included; a small source may give fewer.
        output: the tokenizer.json to write; replaced if it is there.

    Returns:
        The tokenizer, as loaded from `output`.

    Raises:
        ValueError: a vocabulary too small for the bytes, no directory to write into, a source without text.
    """
    if vocab_size < _MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size}: expected at least {_MIN_VOCAB_SIZE}, the bytes and end-of-text")
    output = expand_home(output, "output")
    if not output.parent.is_dir():
        raise ValueError(f"output={str(output)!r}: there is no directory {str(output.parent)!r}")
    source = find_split(config, "train")
    documents = source.open()
    if documents.holds_tokens:
        raise ValueError(f"data.feature={config.feature!r}: {source.name} holds token ids there; expected text")
    end_of_text = END_OF_TEXT_NAMES[0]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_text],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(_texts(documents, source.name), trainer=trainer, length=len(documents))
    unfinished = output.with_name(f"{output.name}.{os.getpid()}.incomplete")
    try:
        tokenizer.save(str(unfinished))
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
    return HuggingFaceTokenizer(output)


def _texts(documents: DocumentSource, name: str) -> Iterator[str]:
    """The documents that are text; says how many are not."""
    passed_over = 0
    for index in progress_bar(range(len(documents)), unit=" documents", desc=f"Reading {name}"):
        try:
            yield documents[index].decode("utf-8")
        except UnicodeDecodeError:
            passed_over += 1
    if passed_over:
        _logger.warning("%s: %d documents are not UTF-8 and were passed over", name, passed_over)
