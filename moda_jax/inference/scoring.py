"""Log-probabilities of given tokens: what perplexity and downstream tasks are made of.

A window is a piece of text of which the last tokens count and the others are their context. Windows are run in batches
of similar length, longest first, padded at the end (attention is causal, so padding is never seen); the logits are
taken a block of tokens at a time, so that [T, V] never stands in memory as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.inference.decode import model_config
from moda_jax.inference.generation import padded_length
from moda_jax.model.function import ModelFunction

Array = jax.Array

BATCH_TOKENS = {"cpu": 2**12, "gpu": 2**16}  # tokens of a batch
LOGITS = {"cpu": 2**22, "gpu": 2**28}  # elements of a block of logits


class Window(NamedTuple):
    """A piece of text to score.

    Attributes:
        tokens: int32 [n + 1]; the model reads the first n, and predicts each one's successor.
        scored: how many of the last tokens count, 0..n.
    """

    tokens: np.ndarray
    scored: int


class Score(NamedTuple):
    """What a window came to.

    Attributes:
        log_probs: float64 [scored], natural logarithm of each scored token's probability.
        greedy: every scored token was the likeliest one.
    """

    log_probs: np.ndarray
    greedy: bool


def score_windows(
    model: ModelFunction,
    params: Any,
    windows: Sequence[Window],
    *,
    vocab_size: int | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[Score]:
    """Scores windows of any lengths up to the model's context.

    Args:
        model: of a `Transformer`.
        params: from `decode.inference_params`.
        windows: what to score.
        vocab_size: only tokens below compete for "likeliest"; None: the model's vocabulary.
        progress: told how many scored tokens were done since the last call.

    Returns:
        A score per window, in the order of the windows.
    """
    config = model_config(model, params)
    vocab_size = config.vocab_size if vocab_size is None else vocab_size
    scores: list[Score | None] = [None] * len(windows)
    pending: tuple | None = None

    def collect(indices: list[int], log_probs: Array, likeliest: Array) -> None:
        log_probs, likeliest = np.asarray(log_probs, np.float64), np.asarray(likeliest)
        done = 0
        for row, index in enumerate(indices):
            tokens, scored = windows[index]
            places = slice(len(tokens) - 1 - scored, len(tokens) - 1)
            scores[index] = Score(log_probs[row, places], bool(likeliest[row, places].all()))
            done += scored
        progress(done)

    for indices, tokens, targets in _batches(windows, config.max_sequence_length):
        result = target_log_probs(model, params, tokens, targets, vocab_size=vocab_size)
        if pending is not None:  # one late: the device has work while the host reads
            collect(*pending)
        pending = (indices, *result)
    if pending is not None:
        collect(*pending)
    return scores  # type: ignore[return-value]


@functools.partial(jax.jit, static_argnames=("model", "vocab_size"))
def target_log_probs(
    model: ModelFunction, params: Any, tokens: Array, targets: Array, *, vocab_size: int
) -> tuple[Array, Array]:
    """Log-probability of each target, over the model's whole vocabulary, and whether it is the likeliest token.

    Args:
        model, params: as in `score_windows`.
        tokens, targets: [B, T] int32.
        vocab_size: as in `score_windows`.

    Returns:
        [B, T] float32 and [B, T] bool.
    """
    module = model.module(params)
    hidden = module.hidden(tokens)  # [B, T, D]
    batch, T, _ = hidden.shape
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    size = max(1, min(T, LOGITS[platform] // (batch * module.config.vocab_size)))
    count = -(-T // size)

    def block(i: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        begin = jnp.minimum(i * size, T - size)  # the last block overlaps: it computes some places again
        part, target = (jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1) for x in (hidden, targets))
        logits = module.logits(part)  # [B, size, V]
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        log_probs = chosen - jax.nn.logsumexp(logits, axis=-1)
        likeliest = jnp.argmax(logits[..., :vocab_size], axis=-1) == target
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, new, begin, axis=1)
            for whole, new in zip(results, (log_probs, likeliest), strict=True)
        )

    return jax.lax.fori_loop(0, count, block, (jnp.zeros((batch, T), jnp.float32), jnp.zeros((batch, T), bool)))


def _batches(windows: Sequence[Window], longest: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """(indices of the windows, tokens [B, T], targets [B, T]); the last batch of a shape has rows that are padding."""
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    by_length: dict[int, list[int]] = {}
    for index, window in enumerate(windows):
        length = len(window.tokens) - 1
        if not 0 <= window.scored <= length <= longest:
            raise ValueError(f"window {index}: {window.scored} of {length} tokens, expected at most {longest}")
        by_length.setdefault(padded_length(length, longest), []).append(index)
    for T, members in sorted(by_length.items(), reverse=True):
        rows = max(1, min(len(members), BATCH_TOKENS[platform] // T))
        for begin in range(0, len(members), rows):
            indices = members[begin : begin + rows]
            tokens, targets = np.zeros((2, rows, T), np.int32)
            for row, index in enumerate(indices):
                text = windows[index].tokens
                tokens[row, : len(text) - 1], targets[row, : len(text) - 1] = text[:-1], text[1:]
            yield indices, tokens, targets
