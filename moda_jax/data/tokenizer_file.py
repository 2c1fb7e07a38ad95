"""What a tokenizer.json must not do: end a document by its text, draw tokens by chance, or lose characters unseen.

`settle` switches off what makes tokens depend on more than the text. `without_token` is the same tokenizer with one
token out of the text's reach. `LossCounter` finds the characters of a text that stand in no token.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel

# Steps that keep every character, in some form. Any other step, one of a later version too, is watched.
_KEEPING_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "ByteLevel"}
_KEEPING_PRE_TOKENIZERS = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength"}
_CHANCE = ("dropout", "alpha", "nbest_size")  # a model's settings that draw its tokens: BPE's, and Unigram's two
_OUT_OF_REACH = "\U0010ffff"  # no character: Unicode keeps it free for marks like this


def settle(backend: Backend) -> list[str]:
    """Makes the tokens a function of the text; returns the settings of the file that drew them by chance until now."""
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # text that spells a special token is text
    drawn = [name for name in _CHANCE if getattr(backend.model, name, None)]
    for name in drawn:
        setattr(backend.model, name, None)
    return drawn


def without_token(settings: dict[str, Any], name: str) -> Backend:
    """The tokenizer with the same ids for the same text, but no text gives the token `name`.

    The token gets a name that no text has: as an added token, in the model's vocabulary, and the merges that end in it
    are gone. Where it also was the unknown token, there is none.

    Args:
        settings: content of a tokenizer.json.
        name: of the token.

    Raises:
        ValueError: the file cannot be read without it.
    """
    hidden = f"{_OUT_OF_REACH}{name}{_OUT_OF_REACH}"
    added = [
        token | {"content": hidden, "special": True, "normalized": False} if token["content"] == name else token
        for token in settings.get("added_tokens") or []
    ]
    model = dict(settings["model"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pieces in the order of their ids
        unknown = model.get("unk_id")
        model["vocab"] = [[hidden if piece == name else piece, score] for piece, score in vocabulary]
        if unknown is not None and vocabulary[unknown][0] == name:
            model["unk_id"] = None
    else:
        model["vocab"] = {hidden if piece == name else piece: number for piece, number in vocabulary.items()}
        if model.get("unk_token") == name:  # a BPE can be without; the others then refuse what they do not know
            model["unk_token"] = None if "merges" in model else _OUT_OF_REACH
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
        model["merges"] = [
            list(pair) for pair in pairs if name not in (*pair, pair[0] + pair[1].removeprefix(prefix))
        ]  # fmt: skip
    changed = settings | {"model": model, "added_tokens": added, "post_processor": None}
    try:
        backend = Backend.from_str(json.dumps(changed))
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise ValueError(f"cannot be read without its token {name!r} ({error})") from error
    settle(backend)
    return backend


def unknown_id(settings: dict[str, Any], backend: Backend) -> int | None:
    """The token for text that the vocabulary lacks; None: there is none, or the vocabulary lacks it too."""
    model = settings["model"]
    if "unk_id" in model:
        return model["unk_id"]
    name = model.get("unk_token")
    return None if name is None else backend.token_to_id(name)


@dataclasses.dataclass(frozen=True)
class Losses:
    """What became of text on its way into tokens.

    Attributes:
        replaced_documents: were not valid UTF-8; each bad byte became U+FFFD.
        dropped_characters: stand in no token, without white space.
        dropped_spaces: white space that stands in no token.
        unknown_tokens: stand for text that the vocabulary lacks.
    """

    replaced_documents: int = 0
    dropped_characters: int = 0
    dropped_spaces: int = 0
    unknown_tokens: int = 0

    def __add__(self, other: Losses) -> Losses:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Losses(*(mine + theirs for mine, theirs in pairs))

    def __str__(self) -> str:
        """What was lost, in words; "" if nothing was."""
        parts = (
            (self.replaced_documents, "documents were not UTF-8, their bad bytes became U+FFFD"),
            (self.dropped_characters, "characters stand in no token"),
            (self.dropped_spaces, "white-space characters stand in no token"),
            (self.unknown_tokens, "tokens are the unknown token"),
        )
        return "; ".join(f"{number} {what}" for number, what in parts if number)


class LossCounter:
    """Counts the characters that a tokenizer drops.

    Args:
        settings: content of the tokenizer.json.
        backend: of it.
        has_unknown: what the vocabulary lacks becomes a token of its own.

    Attributes:
        needed: something in the file can drop characters; if not, there is nothing to count.
    """

    def __init__(self, settings: dict[str, Any], backend: Backend, *, has_unknown: bool):
        self._drops_unknown = not has_unknown and _drops_unknown(settings)
        self.needed = self._drops_unknown or not _keeps_text(settings)
        self._backend = backend
        self._vanishing: dict[str, bool] = {}

    def count(self, text: str, encoding: Encoding) -> Losses:
        """The losses of one text; the encoding must hold offsets."""
        marks = np.zeros(len(text) + 1, np.int64)
        if encoding.offsets:
            begins, ends = np.asarray(encoding.offsets, np.int64).T
            np.add.at(marks, begins, 1)
            np.subtract.at(marks, ends, 1)
        lost = np.cumsum(marks[:-1]) == 0  # a token that spans a vanished character covers it too
        gone = {character for character in set(text) if self._vanishes(character)}
        vanished = np.fromiter((character in gone for character in text), bool, len(text))
        if self._drops_unknown:  # behind a dropped character offsets are too small; their sum holds
            others = max(0, int(lost.sum() - vanished.sum()))
            lost = vanished
        else:
            others = 0
            lost |= vanished
        places = np.flatnonzero(lost)
        spaces = sum(text[place].isspace() for place in places)
        return Losses(dropped_characters=len(places) - spaces + others, dropped_spaces=spaces)

    def _vanishes(self, character: str) -> bool:
        """Whether nothing is made of it, wherever it stands."""
        if character not in self._vanishing:
            if self._drops_unknown:
                gone = not self._backend.encode(character, add_special_tokens=False).ids
            elif self._backend.normalizer is None or character.isspace():  # of white space the place decides
                gone = False
            else:
                gone = self._backend.normalizer.normalize_str(character) == ""
            self._vanishing[character] = gone
        return self._vanishing[character]


def _keeps_text(settings: dict[str, Any]) -> bool:
    """Whether what comes before the model keeps every character."""
    return (
        all(
            step["type"] in _KEEPING_NORMALIZERS or (step["type"] == "Replace" and step.get("content"))
            for step in _steps(settings.get("normalizer"), "normalizers")
        )
        and all(
            step["type"] in _KEEPING_PRE_TOKENIZERS
            or (step["type"] in ("Split", "Punctuation") and step.get("behavior") not in (None, "Removed"))
            for step in _steps(settings.get("pre_tokenizer"), "pretokenizers")
        )
        and not any(token.get("lstrip") or token.get("rstrip") for token in settings.get("added_tokens") or [])
    )


def _drops_unknown(settings: dict[str, Any]) -> bool:
    """Whether a model without unknown token drops what its vocabulary lacks: a BPE does that, others refuse."""
    model = settings["model"]
    if "merges" not in model:
        return False
    steps = [
        *_steps(settings.get("normalizer"), "normalizers"), *_steps(settings.get("pre_tokenizer"), "pretokenizers")
    ]  # fmt: skip
    if any(step["type"] == "ByteLevel" for step in steps):
        return not model["vocab"].keys() >= set(ByteLevel.alphabet())
    return not (model.get("byte_fallback") and model["vocab"].keys() >= {f"<0x{byte:02X}>" for byte in range(256)})


def _steps(step: dict[str, Any] | None, parts: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, those of a sequence one by one."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for part in step[parts]:
            yield from _steps(part, parts)
    else:
        yield step
