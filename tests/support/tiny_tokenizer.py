"""A byte-level BPE tokenizer.json, trained on a few words in milliseconds."""

from __future__ import annotations

from pathlib import Path

import tokenizers

WORDS = ("def", "return", "import", "class", "self", "value", "print", "länge", "日本語", "🙂🙃")


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
