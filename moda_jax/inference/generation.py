"""Text from prompts: batches of different lengths, stop strings, text as it comes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from moda_jax.config import check_text
from moda_jax.data.tokenizer import Tokenizer
from moda_jax.data.tokenizer_file import Losses
from moda_jax.inference import decode
from moda_jax.inference.packed import CAPACITY_STEP
from moda_jax.inference.sampling import SamplingConfig, row_keys
from moda_jax.model.function import ModelFunction

_logger = logging.getLogger(__name__)

CHUNK = 8  # tokens between two looks of the host: what is streamed at once, and at most wasted behind a stop
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_PARTIAL = 3  # a character's bytes that can be there while the last is missing


class Completion(NamedTuple):
    """The continuation of one prompt.

    Attributes:
        text: without the prompt, the stop string or the end-of-text token.
        num_tokens: that were generated, the ones of a stop string included.
        reason: why it ended: "stop", "end_of_text" or "length".
    """

    text: str
    num_tokens: int
    reason: str


class TextStream:
    """Text from tokens that come one by one; a character or a stop string that may still go on is held back.

    The pieces joined are the tokenizer's decoding of all tokens, up to the first stop string.

    Args:
        tokenizer: of the tokens.
        prompt: the tokens before; some tokenizers decode a token by its neighbour.
        stop: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = [int(token) for token in prompt]
        self._shown = len(tokenizer.decode(self._ids))
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now and was not before."""
        self._ids += [int(token) for token in ids]
        return self._advance(final=False)

    def finish(self) -> str:
        """What was held back."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._tokenizer.decode(self._ids)[self._shown :]
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, end = True, min(found)
        else:
            end = len(text) if final else self._certain(text)
        self._shown += end
        return text[:end]

    def _certain(self, text: str) -> int:
        """Length of the part that no further token can change or take away."""
        partial = len(text) - len(text.rstrip(_REPLACEMENT))  # bytes of an unfinished character look so
        end = len(text) - min(partial, _MAX_PARTIAL)
        longest = max(map(len, self._stop), default=0)
        for begin in range(max(0, end - longest + 1), end):
            if any(stop.startswith(text[begin:end]) for stop in self._stop):
                return begin
        return end


def generate(
    model: ModelFunction,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str | np.ndarray],
    *,
    max_tokens: int | Sequence[int],
    sampling: SamplingConfig | None = None,
    stop: Sequence[str] = (),
    key: jax.Array | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_end: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Continues prompts, all of them as one batch.

    A row's continuation depends on its own prompt and the key alone, up to rounding: not on the other rows.

    Args:
        model: of a `Transformer`.
        params: from `decode.inference_params`.
        tokenizer: of the training data.
        prompts: texts, or their token ids, of at least one token each.
        max_tokens: tokens of a continuation, one number for all rows or one per row; with the prompt at most
            `max_sequence_length` of the model.
        sampling: None: `SamplingConfig()`.
        stop: strings that end a continuation.
        key: a typed PRNG key; equal keys give equal text. None: `jax.random.key(0)`.
        on_text: called with a row and its next piece of text, as soon as it is certain.
        on_end: called with a row when its continuation has ended.

    Returns:
        A completion per prompt.

    Raises:
        ValueError: no prompt, one without tokens, one that does not fit the model's context, or an empty stop string.
    """
    longest = decode.model_config(model, params).max_sequence_length
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    ids = encode_prompts(tokenizer, prompts, limits, longest)
    if "" in stop:
        raise ValueError("stop='': expected a string of at least one character")
    for text in stop:
        check_text(text, "stop")
    params = decode.decode_params(params, decode.model_config(model, params))
    sampling = SamplingConfig() if sampling is None else sampling
    key = jax.random.key(0) if key is None else key
    tokens, start = pad_prompts(ids, longest)
    capacity = tokens.shape[1] + -(-max(limits) // CHUNK) * CHUNK
    if "packed" in params:
        capacity += -capacity % CAPACITY_STEP
    logits, cache = decode.prefill(model, params, tokens, start, capacity=capacity, padded=bool(start.any()))
    choice = {"sampling": sampling, "vocab_size": tokenizer.vocab_size}
    state = decode.start(logits, cache, row_keys(key, ids), **choice)

    rows = [_Row(tokenizer, prompt, stop, limit) for prompt, limit in zip(ids, limits, strict=True)]
    while any(row.reason is None for row in rows):
        state, tokens = decode.decode(model, params, state, num_steps=CHUNK, **choice)
        for i, (row, new) in enumerate(zip(rows, _to_host(tokens), strict=True)):
            if row.reason is not None:
                continue
            piece = row.push(new)
            if piece and on_text is not None:
                on_text(i, piece)
            if row.reason is not None and on_end is not None:
                on_end(i)
    return [Completion("".join(row.pieces), row.count, row.reason) for row in rows]


class OrderedText:
    """Writes the rows of a batch one after the other, each as early as that order allows.

    Args:
        prompts: written before their continuations.
        stream: a text stream.
    """

    def __init__(self, prompts: Sequence[str], stream: TextIO):
        self._stream = stream
        self._waiting = list(prompts)  # a row's text that is not written yet
        self._ended = [False] * len(prompts)
        self._row = 0

    def add(self, row: int, text: str) -> None:
        """More text of a row."""
        self._waiting[row] += text
        self._write()

    def end(self, row: int) -> None:
        """The row is complete."""
        self._ended[row] = True
        self._write()

    def _write(self) -> None:
        while self._row < len(self._waiting):
            self._stream.write(self._waiting[self._row])
            self._waiting[self._row] = ""
            if not self._ended[self._row]:
                break
            self._row += 1
            self._stream.write("\n" if self._row == len(self._waiting) else "\n---\n")
        self._stream.flush()


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str | np.ndarray], limits: Sequence[int], max_sequence_length: int
) -> list[np.ndarray]:
    """Token ids of each prompt; `limits` are the tokens that may follow each.

    Raises:
        ValueError: as `generate`.
    """
    if not prompts:
        raise ValueError("prompt: none given, expected at least one")
    if len(limits) != len(prompts):
        raise ValueError(f"max_tokens: {len(limits)} numbers for {len(prompts)} prompts, expected one per prompt")
    encoded = []
    for prompt, max_tokens in zip(prompts, limits, strict=True):
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: expected at least 1")
        if isinstance(prompt, str):
            check_text(prompt, "prompt")
        shown = f"{prompt if len(prompt) <= 40 else prompt[:37] + '...'!r}" if isinstance(prompt, str) else "tokens"
        ids = np.asarray(prompt, np.int32) if not isinstance(prompt, str) else _encode(tokenizer, prompt, shown)
        if len(ids) == 0:
            raise ValueError(f"prompt={shown}: gives no tokens")
        if len(ids) >= max_sequence_length:
            raise ValueError(
                f"prompt={shown}: has {len(ids)} tokens, but the model's context is {max_sequence_length} "
                "(model.max_sequence_length), prompt and continuation together; shorten it"
            )
        if len(ids) + max_tokens > max_sequence_length:
            raise ValueError(
                f"max_tokens={max_tokens}: expected at most {max_sequence_length - len(ids)}, because prompt={shown} "
                f"has {len(ids)} tokens and the model's context is {max_sequence_length}"
            )
        encoded.append(ids)
    return encoded


def _encode(tokenizer: Tokenizer, prompt: str, shown: str) -> np.ndarray:
    """The prompt's tokens, int32 [n]; says what the tokenizer loses."""
    (ids,), losses = tokenizer.encode_batch([prompt.encode("utf-8")])
    if losses != Losses():
        _logger.warning("prompt=%s: the tokenizer lost text: %s", shown, losses)
    return np.asarray(ids, np.int32)


def padded_length(length: int, longest: int) -> int:
    """A length a little above `length`, one of few (four per power of two), so that few shapes are compiled."""
    step = max(16, 1 << max(length.bit_length() - 3, 0))
    return max(length, min(-(-length // step) * step, longest))


def pad_prompts(ids: Sequence[np.ndarray], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows aligned at their ends: tokens [B, T] int32, and where each row begins, [B] int32."""
    T = padded_length(max(map(len, ids)), longest)
    tokens = np.zeros((len(ids), T), np.int32)
    start = np.array([T - len(row) for row in ids], np.int32)
    for i, row in enumerate(ids):
        tokens[i, start[i] :] = row
    return tokens, start


def _to_host(tokens: jax.Array) -> np.ndarray:
    """The tokens, in every process."""
    if not tokens.is_fully_addressable:
        tokens = multihost_utils.process_allgather(tokens, tiled=True)
    return np.asarray(tokens)


class _Row:
    """One continuation as it grows."""

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, stop: Sequence[str], max_tokens: int):
        self._end_of_text, self._left = tokenizer.end_of_text_id, max_tokens
        self._stream = TextStream(tokenizer, prompt, stop)
        self.pieces: list[str] = []
        self.count = 0
        self.reason: str | None = None

    def push(self, tokens: np.ndarray) -> str:
        """Takes the next tokens, sets `reason` if the text has ended, and returns the new piece of text."""
        tokens = tokens[: self._left]
        ends = np.flatnonzero(tokens == self._end_of_text)
        kept = tokens[: ends[0]] if ends.size else tokens
        self.count += len(kept)
        self._left -= len(kept)
        piece = self._stream.push(kept)
        if not self._stream.stopped and (ends.size or self._left == 0):
            self.reason = "end_of_text" if ends.size else "length"
            piece += self._stream.finish()
        if self._stream.stopped:
            self.reason = "stop"
        self.pieces.append(piece)
        return piece
