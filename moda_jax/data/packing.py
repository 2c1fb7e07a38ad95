"""Rows of fixed length from one stream of tokens, in plain NumPy.

The stream of a split is its documents, one after the other, each ending in an end-of-text token. Row r holds the
stream's tokens [r*T, (r+1)*T); its targets are the tokens one place further, so a row's last target is the next row's
first token. Nothing is thrown away but the tail: behind the last row stand 1 to T tokens, the first of which is that
row's last target. Up to there an epoch has every token as a target exactly once, but for the documents' first tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moda_jax.data.file_array import FileArray
from moda_jax.parallel.batches import ArrayLayout


class Batch(NamedTuple):
    """Rows of packed documents: B rows of T tokens.

    Attributes:
        tokens: int32 [B, T], the stream's tokens.
        targets: int32 [B, T], the stream's tokens one place further.
        segment_ids: int32 [B, T], the number of the document inside its row, from 0; tokens of equal ids may attend to
            each other.
        positions: int32 [B, T], place inside the segment, from 0 at the segment's first token in this row.
        target_mask: float32 [B, T], 1, or 0 where the target belongs to another document than the token, or is padding.
    """

    tokens: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    target_mask: np.ndarray


def batch_layout(batch_size: int, sequence_length: int) -> Batch:
    """The `ArrayLayout` of every array of a global batch."""
    integers = ArrayLayout((batch_size, sequence_length), "int32", ("batch", "tokens"))
    return Batch(integers, integers, integers, integers, ArrayLayout(integers.shape, "float32", integers.axes))


def count_rows(num_tokens: int, sequence_length: int) -> int:
    """Rows of `sequence_length` tokens that a stream gives; a row's last target needs one token behind the row."""
    return max(0, num_tokens - 1) // sequence_length


def pack_rows(
    tokens: np.ndarray | FileArray, offsets: np.ndarray | FileArray, rows: np.ndarray, sequence_length: int
) -> Batch:
    """Builds rows of a token stream; any subset, in any order.

    Args:
        tokens: integer [N], the documents' tokens one after the other, each document's end-of-text included.
        offsets: int64 [documents + 1], strictly increasing from 0 to N: document d is
            tokens[offsets[d]:offsets[d + 1]].
        rows: integer [B], row numbers in 0..count_rows(N, T)-1.
        sequence_length: T.

    Returns:
        A Batch of B rows of T tokens.

    Raises:
        ValueError: a row outside of the stream.
    """
    T = sequence_length
    num_rows = count_rows(len(tokens), T)
    rows = np.asarray(rows, dtype=np.int64)
    if rows.size and not 0 <= rows.min() <= rows.max() < num_rows:
        raise ValueError(f"rows={rows.tolist()}: expected numbers in 0..{num_rows - 1}, the rows of this stream")
    B = len(rows)
    stream = np.empty((B, T + 1), np.int32)
    segment_ids = np.zeros((B, T), np.int32)
    positions = np.empty((B, T), np.int32)
    target_mask = np.ones((B, T), np.float32)
    places = np.arange(T, dtype=np.int32)
    for b, row in enumerate(rows):
        start = row * T
        stream[b] = tokens[start : start + T + 1]
        first, last = (offsets.searchsorted(place, side="right") for place in (start, start + T))
        boundaries = offsets[first:last] - start  # in 1..T: the places in this row where a new document starts
        target_mask[b, boundaries - 1] = 0.0
        boundaries = boundaries[boundaries < T]
        segment_ids[b, boundaries] = 1
        np.cumsum(segment_ids[b], out=segment_ids[b])
        segment_starts = np.concatenate(([0], boundaries))
        positions[b] = places - segment_starts[segment_ids[b]]
    return Batch(
        tokens=np.ascontiguousarray(stream[:, :-1]),
        targets=np.ascontiguousarray(stream[:, 1:]),
        segment_ids=segment_ids,
        positions=positions,
        target_mask=target_mask,
    )


def pad_rows(batch: Batch, num_rows: int) -> Batch:
    """Appends rows with a target mask of 0 until the batch has `num_rows`."""
    missing = num_rows - len(batch.tokens)
    if missing <= 0:
        return batch
    padded = Batch(*(np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)]) for array in batch))
    padded.positions[-missing:] = np.arange(batch.positions.shape[1], dtype=np.int32)
    return padded
