"""Small tokenizer.json files: a byte-level BPE, trained on a few words in milliseconds, and one that drops text."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from moda_jax.data.tokenizer import HuggingFaceTokenizer

WORDS = ("def", "return", "import", "class", "self", "value", "print", "länge", "日本語", "🙂🙃")


def words_without_unknown(path: Path) -> HuggingFaceTokenizer:
    """A tokenizer.json whose unknown token is not in its vocabulary."""
    model = tokenizers.models.WordLevel({"</s>": 0, "good": 1, "text": 2}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return HuggingFaceTokenizer(path)


def write_letters(path: Path, unknown: str | None = None) -> Path:
    """A BPE of the letters a, b and c that drops what it does not know, or has the token `unknown` for it."""
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "c": 3} | ({} if unknown is None else {unknown: 4})
    tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token=unknown)).save(str(path))
    return path


def write_bpe(path: Path, vocab_size: int = 280, words: tuple[str, ...] = WORDS) -> Path:
    """Byte-level, so that a token may be a part of a character; end-of-text is token 0."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([" ".join(words)] * 5, trainer=trainer)
    tokenizer.save(str(path))
    return path
