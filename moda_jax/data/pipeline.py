"""From a config to batches of rows: preparation, order, prefetch, resume.

Rows are a function of (corpus, tokenizer, sequence length, seed, epoch, global row index) alone. Global rows are
counted over the whole run: a batch of size B holds the B rows from its position on, and process p of P takes the p-th
of P equal blocks of them, so the assembled batch is the same array whatever P is. Of a mixture a global row is first
one of a source, see `mixture`; each source has its own epochs, in its own order.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
from absl import flags

from moda_jax.config import DataConfig
from moda_jax.data.cache import cache_directory, cache_key
from moda_jax.data.damage import SkippedDocuments
from moda_jax.data.mixture import MixedOrder, TokenMixture
from moda_jax.data.packing import Batch, pack_rows, pad_rows
from moda_jax.data.sources import find_split
from moda_jax.data.token_store import TOKENS_VERSION, TokenDataset, open_tokens, prepare_tokens
from moda_jax.data.tokenizer import Tokenizer

PREPARED_TOKENS = "tokens:"  # before the directory of splits that were tokenised elsewhere
_READ_THREADS = 2  # building a row is short work under the GIL; a second thread hides a page that must come from disk


def open_dataset(
    config: DataConfig, split: str, tokenizer: Tokenizer, *, as_before: bool = False
) -> TokenDataset | TokenMixture:
    """The tokenised split of `data.source`; prepares what the cache does not hold, with progress on stderr. Of a
    mixture each source is prepared as it would be alone, so that the cache is shared with runs on one of them.

    Args:
        config: the data section.
        split: "train" or "validation".
        tokenizer: from `load_tokenizer`.
        as_before: by the first version's rules of what is a document, for a run that was begun with them.

    Raises:
        ValueError: a source that is missing, empty or not usable, or a split too small for one row; the message names
            the config field.
    """
    if len(config.sources) > 1:
        rows, sources = zip(*config.sources, strict=True)
        parts = (open_dataset(config.of_one(source), split, tokenizer, as_before=as_before) for source in sources)
        return TokenMixture(tuple(parts), rows, f"{config.source} ({split})")
    if config.source.startswith(PREPARED_TOKENS):
        dataset = open_tokens(Path(config.source.removeprefix(PREPARED_TOKENS)) / split, tokenizer)
    else:
        dataset = _open_prepared(config, split, tokenizer, as_before)
    if dataset.num_rows(config.sequence_length) == 0:
        raise ValueError(
            f"data.source={config.source!r}: the {split} split has {dataset.num_tokens} tokens in "
            f"{dataset.num_documents} documents, too few for one row: data.sequence_length={config.sequence_length} "
            f"needs {config.sequence_length + 1}"
        )
    return dataset


def _open_prepared(config: DataConfig, split: str, tokenizer: Tokenizer, as_before: bool) -> TokenDataset:
    """A split from the cache, which is prepared first where it is not there."""
    source = find_split(config, split, as_before=as_before)
    # Tokens that were made before the end-of-text token was kept out of text stay where they are.
    hidden_end = {"hides_end_of_text": True} if tokenizer.hides_end_of_text and not as_before else {}
    key = cache_key(
        documents=source.identity, tokenizer=tokenizer.fingerprint, version=TOKENS_VERSION,
        on_damage=config.on_damage, on_invalid_utf8=config.on_invalid_utf8, **hidden_end,
    )  # fmt: skip
    directory = cache_directory(config) / "tokens" / key
    return prepare_tokens(directory, source.open, tokenizer, source.name, SkippedDocuments(config))


class TrainBatches:
    """An endless iterator of batches that knows where it is; see `train_batches`.

    Attributes:
        position: global rows consumed so far, over all processes: what a checkpoint stores.
    """

    def __init__(
        self, batches: grain.MapDataset, batch_size: int, position: int, prefetch_batches: int, **how_to_read: int
    ):
        self._batch_size = batch_size
        self._iterator = read_ahead(batches, prefetch_batches, **how_to_read)
        self.position = position

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.position += self._batch_size
        return batch

    def close(self) -> None:
        """Ends the reading threads; further batches are a ValueError."""
        self._iterator.close()

    def __enter__(self) -> TrainBatches:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def train_batches(
    dataset: TokenDataset | TokenMixture,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    position: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """Endless training batches; every epoch of a source has each of its rows once, in its own order when `data.shuffle`
    is on.

    Args:
        dataset: from `open_dataset`.
        config: `sequence_length`, `shuffle` and `prefetch_batches` are used.
        batch_size: B, rows of a global batch.
        seed: of the order.
        position: global rows that were consumed before; with `TrainBatches.position` of an earlier run, the batches go
            on exactly where it stopped.
        process_index, process_count: this process's share is B / process_count rows.

    Returns:
        An iterator of `Batch` (this process's rows) with `position` and `close()`. A prepared file that is changed
        meanwhile ends it with a `DataLostError`.

    Raises:
        ValueError: an argument out of range, or a batch size that the processes cannot share.
    """
    rows_here = share_of_batch(batch_size, process_index, process_count)
    for name, value in (("seed", seed), ("position", position)):
        if value < 0:
            raise ValueError(f"{name}={value}: expected a number >= 0")
    T = config.sequence_length
    mixture = _as_mixture(dataset)
    epochs = [_epochs(part, config, f"{seed}/{k}" if k else str(seed)) for k, part in enumerate(mixture.parts)]
    order = MixedOrder(mixture.rows)

    def pack(places: np.ndarray) -> Batch:
        sources, numbers = order.locate(places[rows_here])
        rows = np.array([epochs[k][int(number)] for k, number in zip(sources, numbers, strict=True)])
        return _pack(mixture, sources, rows, T)

    batches = grain.MapDataset.range(sys.maxsize)[position:].batch(batch_size, drop_remainder=True, batch_fn=np.asarray)
    return TrainBatches(batches.map(pack), batch_size, position, config.prefetch_batches)


def validation_batches(
    dataset: TokenDataset | TokenMixture,
    config: DataConfig,
    *,
    batch_size: int,
    num_batches: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """One pass over rows in order, all or evenly spread; the last batch is filled up with rows of target mask 0.

    Of a mixture the rows are in the proportion of its weights, as in training, each source's spread evenly over its
    own validation split. No row comes twice: "all" are as many as the source that is exhausted first allows.

    Args:
        dataset: from `open_dataset`.
        config: `sequence_length` and `prefetch_batches` are used.
        batch_size: B, rows of a global batch.
        num_batches: at most so many batches, of rows spread evenly over the split (the first rows alone would be a few
            documents); 0: all rows.
        process_index, process_count: this process's share is B / process_count rows of every batch.

    Returns:
        An iterator of `Batch`, as many in every process.

    Raises:
        ValueError: an argument out of range, or a batch size that the processes cannot share.
    """
    rows_here = share_of_batch(batch_size, process_index, process_count)
    if num_batches < 0:
        raise ValueError(f"num_batches={num_batches}: expected a number >= 0 (0: all)")
    T = config.sequence_length
    mixture = _as_mixture(dataset)
    order = MixedOrder(mixture.rows)
    whole = [_num_rows(part, T) for part in mixture.parts]
    all_rows = min(order.place_of(k, rows) for k, rows in enumerate(whole))
    num_rows = min(all_rows, num_batches * batch_size) if num_batches else all_rows
    chosen = order.counts(num_rows)

    def pack(places: np.ndarray) -> Batch:
        sources, numbers = order.locate(places[rows_here])
        rows = numbers * np.take(whole, sources) // np.take(chosen, sources)
        return pad_rows(_pack(mixture, sources, rows, T), batch_size // process_count)

    batches = grain.MapDataset.range(num_rows).batch(batch_size, drop_remainder=False, batch_fn=np.asarray).map(pack)

    def run() -> Iterator[Batch]:
        iterator = read_ahead(batches, config.prefetch_batches)
        try:
            yield from iterator
        finally:
            iterator.close()

    return run()


def _as_mixture(dataset: TokenDataset | TokenMixture) -> TokenMixture:
    """One source is a mixture of one."""
    return dataset if isinstance(dataset, TokenMixture) else TokenMixture((dataset,), (1,), dataset.name)


def _epochs(dataset: TokenDataset, config: DataConfig, seed: str) -> grain.MapDataset:
    """The rows of a source, epoch after epoch: any of them by how many come before it."""
    rows = grain.MapDataset.range(_num_rows(dataset, config.sequence_length))
    return (rows.shuffle(seed=order_seed(seed)) if config.shuffle else rows).repeat()


def _pack(mixture: TokenMixture, sources: np.ndarray, rows: np.ndarray, sequence_length: int) -> Batch:
    """Rows of sources whose files are still those that were opened, in the order in which they came."""
    order = np.argsort(sources, kind="stable")
    packed = []
    for k in np.unique(sources) if len(sources) else (0,):
        part = mixture.parts[k]
        if part.guard is not None:
            part.guard.check()
        packed.append(pack_rows(part.tokens, part.offsets, rows[order][sources[order] == k], sequence_length))
    if len(packed) == 1:
        return packed[0]
    back = np.argsort(order)
    return Batch(*(np.concatenate(arrays)[back] for arrays in zip(*packed, strict=True)))


def read_ahead(
    batches: grain.MapDataset, prefetch_batches: int, *, threads: int = _READ_THREADS, workers: int = 0
) -> grain.DatasetIterator:
    """Reads ahead in threads, of this process or of each of `workers` others; the order stays."""
    options = grain.ReadOptions(num_threads=min(threads, prefetch_batches), prefetch_buffer_size=prefetch_batches)
    dataset = batches.to_iter_dataset(options)
    if workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain asks its flags when it starts a process; only a command has parsed any
    return iter(dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)) if workers else dataset)


def share_of_batch(batch_size: int, process_index: int, process_count: int) -> slice:
    """This process's rows of a global batch: one block, so that processes in order make up the batch in order."""
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(f"batch_size={batch_size}: expected a positive multiple of process_count={process_count}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index}: expected a number in 0..{process_count - 1}")
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _num_rows(dataset: TokenDataset, sequence_length: int) -> int:
    num_rows = dataset.num_rows(sequence_length)
    if not 0 < num_rows < 2**32:  # Grain's shuffle counts in 32 bits
        raise ValueError(
            f"data.sequence_length={sequence_length}: gives {num_rows} rows of {dataset.name}, which has "
            f"{dataset.num_tokens} tokens; expected 1..{2**32 - 1} rows"
        )
    return num_rows


def order_seed(seed: int | str) -> int:
    """A 32-bit seed for Grain, which adds the epoch to it: without hashing, seed 1 would be seed 0 one epoch late."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "little")
