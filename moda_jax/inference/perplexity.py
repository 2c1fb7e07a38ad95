"""Perplexity of a model on text files, per domain.

A document is its tokens and the end-of-text token behind them; each of these but the first is predicted once, from the
document's own tokens before it, as in training. A document longer than the context is read in windows: the first
predicts all that it holds, each further one its last `stride` tokens, so every prediction has at least context - stride
tokens before it. Per domain, with nats summed over its documents:

    loss          nats / predicted tokens, so long documents weigh more
    perplexity    exp(loss)
    bits per byte nats / (ln 2 * bytes of the text): comparable between tokenizers
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from moda_jax.config import DataConfig
from moda_jax.data.corpus import SUFFIXES, SourceFile, list_files, read_documents
from moda_jax.data.tokenizer_file import Losses
from moda_jax.inference.load import LoadedRun
from moda_jax.inference.scoring import Window, score_windows
from moda_jax.paths import expand_home
from moda_jax.tasks.language import perplexity

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DomainResult:
    """A domain's row of the table.

    Attributes:
        name: of the domain.
        documents, tokens, bytes: documents that were read, tokens that were predicted, bytes of the text.
        loss: nats per predicted token.
        perplexity: exp(loss).
        bits_per_byte: of the text.
    """

    name: str
    documents: int
    tokens: int
    bytes: int
    loss: float
    perplexity: float
    bits_per_byte: float


@dataclasses.dataclass(frozen=True)
class Domain:
    """Texts of one kind, as bytes."""

    name: str
    documents: list[bytes]


def read_domain(argument: str, feature: str = "text") -> Domain:
    """Reads the domain that "NAME=PATH" names.

    Args:
        argument: PATH is a file, or a directory of files as `data.source` takes them. A file of JSON lines has a
            document per line and a .parquet file one per row; any other file is one document.
        feature: the text field of a JSON line, the column of a .parquet file.

    Raises:
        ValueError: not of this form, no such file, or no text in it.
        NotImplementedError: a .parquet file, and pyarrow is not installed.
    """
    name, equals, place = argument.partition("=")
    if not (name and equals and place):
        raise ValueError(f"--data={argument}: expected NAME=PATH, as in --data=wiki=wiki.txt")
    path = expand_home(place, f"--data={name}")
    if not path.exists():
        raise ValueError(f"--data={argument}: no such file or directory; expected NAME=PATH of a text file")
    config = DataConfig(source=place, feature=feature)
    try:
        files = list_files(config) if path.is_dir() or place.lower().endswith(SUFFIXES) else [_source_file(path)]
        documents = [document.text for document in read_documents(files, config, lambda name: "all", "all")]
    except ValueError as error:
        raise ValueError(f"--data={argument}: {str(error).removeprefix(f'data.source={place!r}: ')}") from error
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise ValueError(f"--data={argument}: holds no text; name a file with some")
    return Domain(name, documents)


def domain_windows(tokens: np.ndarray, context: int, stride: int) -> list[Window]:
    """A document's windows.

    Args:
        tokens: int32 [n], end-of-text included.
        context: tokens that the model reads at most.
        stride: predictions of every window but the first.
    """
    windows, predicted = [], 1  # the first token is context only
    while predicted < len(tokens):
        end = min(len(tokens), predicted + (context if not windows else stride))
        begin = max(0, end - 1 - context)
        windows.append(Window(tokens[begin:end], end - predicted))
        predicted = end
    return windows


def evaluate_domains(
    run: LoadedRun,
    domains: Sequence[Domain],
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[DomainResult]:
    """Loss, perplexity and bits per byte of each domain.

    Args:
        run: the model.
        domains: from `read_domain`.
        context: tokens that the model reads at most; None: the run's `data.sequence_length`.
        stride: see the module; None: half of the context.
        progress: told how many tokens of all have been predicted.

    Raises:
        ValueError: a context beyond the model's, or a stride beyond the context.
    """
    context, stride = checked_windows(run, context, stride)
    end = np.array([run.tokenizer.end_of_text_id], np.int32)
    encoded = [[np.concatenate([tokens, end]) for tokens in _encode(run, domain)] for domain in domains]
    windows = [[w for tokens in documents for w in domain_windows(tokens, context, stride)] for documents in encoded]
    total, done = sum(window.scored for domain in windows for window in domain), 0

    def report(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, total)

    results = []
    for domain, pieces in zip(domains, windows, strict=True):
        scores = score_windows(run.model, run.params, pieces, progress=report)
        nats = -math.fsum(value for score in scores for value in score.log_probs)
        tokens = sum(window.scored for window in pieces)
        size = sum(map(len, domain.documents))
        loss = nats / tokens
        results.append(
            DomainResult(
                domain.name, len(domain.documents), tokens, size, loss, perplexity(loss), nats / (math.log(2) * size)
            )
        )
    return results


def checked_windows(run: LoadedRun, context: int | None, stride: int | None) -> tuple[int, int]:
    """Context and stride with their defaults filled in.

    Raises:
        ValueError: as `evaluate_domains`.
    """
    longest = run.config.model.max_sequence_length
    context = run.config.data.sequence_length if context is None else context
    if not 1 <= context <= longest:
        raise ValueError(f"context={context}: expected 1..{longest}, the model's context (model.max_sequence_length)")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride}: expected 1..{context}, the context")
    return context, stride


def format_table(results: Sequence[DomainResult]) -> str:
    """The results for a terminal, a line per domain."""
    width = max(6, *(len(result.name) for result in results))
    lines = [f"{'domain':{width}} {'documents':>10} {'tokens':>11} {'loss':>8} {'perplexity':>11} {'bits/byte':>10}"]
    lines += [
        f"{r.name:{width}} {r.documents:>10} {r.tokens:>11} {r.loss:>8.4f} {r.perplexity:>11.3f} "
        f"{r.bits_per_byte:>10.4f}"
        for r in results
    ]
    return "\n".join(lines)


def _encode(run: LoadedRun, domain: Domain) -> list[np.ndarray]:
    """Tokens of each document; says what the tokenizer loses.

    Raises:
        ValueError: a text that the tokenizer has no tokens for.
    """
    try:
        encoded, losses = run.tokenizer.encode_batch(domain.documents)
    except ValueError as error:
        raise ValueError(f"--data={domain.name}=...: {error}") from error
    if losses != Losses():
        _logger.warning("--data=%s=...: the tokenizer lost text: %s", domain.name, losses)
    return encoded


def _source_file(path: Path) -> SourceFile:
    status = path.stat()
    return SourceFile(str(path), path.name.encode(), status.st_size, status.st_mtime_ns)
