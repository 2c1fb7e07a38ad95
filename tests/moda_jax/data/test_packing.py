"""Row construction against a plain-Python oracle."""

import numpy as np
import pytest

from moda_jax.data.packing import Batch, count_rows, pack_rows, pad_rows

END = 999


def random_documents(rng, number, longest):
    return [[*rng.integers(0, END, rng.integers(1, longest + 1)).tolist(), END] for _ in range(number)]


def stream_of(documents, dtype=np.uint16):
    tokens = np.array([token for document in documents for token in document], dtype)
    return tokens, np.cumsum([0, *map(len, documents)]).astype(np.int64)


def oracle(documents, T):
    """Every row, one token at a time: lists of (token, target, document inside the row, position, mask)."""
    stream = [(token, d) for d, document in enumerate(documents) for token in document]
    rows, at = [], 0
    while at + T + 1 <= len(stream):
        row, first_document, started = [], stream[at][1], at
        for i in range(at, at + T):
            token, d = stream[i]
            if i > at and d != stream[i - 1][1]:
                started = i
            target, target_document = stream[i + 1]
            row.append((token, target, d - first_document, i - started, float(d == target_document)))
        rows.append(row)
        at += T
    return rows


@pytest.mark.parametrize("T", [1, 2, 7, 16, 64])
@pytest.mark.parametrize("longest", [1, 5, 40])
def test_rows_equal_the_oracle(T, longest):
    documents = random_documents(np.random.default_rng(T * 100 + longest), 23, longest)
    tokens, offsets = stream_of(documents)
    expected = oracle(documents, T)
    assert count_rows(len(tokens), T) == len(expected)
    batch = pack_rows(tokens, offsets, np.arange(len(expected)), T)
    for place, field in enumerate(Batch._fields):
        want = np.array([[token[place] for token in row] for row in expected]).reshape(len(expected), T)
        np.testing.assert_array_equal(getattr(batch, field), want, err_msg=field)


def test_dtypes_and_shapes():
    tokens, offsets = stream_of(random_documents(np.random.default_rng(0), 5, 9), np.uint32)
    batch = pack_rows(tokens, offsets, np.array([1, 0]), 4)
    for field in Batch._fields:
        array = getattr(batch, field)
        assert array.shape == (2, 4)
        assert array.dtype == (np.float32 if field == "target_mask" else np.int32)
        assert array.flags.c_contiguous


def test_any_subset_in_any_order():
    tokens, offsets = stream_of(random_documents(np.random.default_rng(1), 30, 12))
    everything = pack_rows(tokens, offsets, np.arange(count_rows(len(tokens), 8)), 8)
    rows = np.array([5, 0, 5, 3])
    for name, array in pack_rows(tokens, offsets, rows, 8)._asdict().items():
        np.testing.assert_array_equal(array, getattr(everything, name)[rows], err_msg=name)


@pytest.mark.parametrize("T", [1, 3, 10])
def test_every_token_is_a_target_once_but_document_firsts(T):
    """Token ids are places in the stream, so targets can be counted."""
    lengths = np.random.default_rng(2).integers(1, 9, 40)
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    tokens = np.arange(offsets[-1], dtype=np.uint16)
    num_rows = count_rows(len(tokens), T)
    batch = pack_rows(tokens, offsets, np.arange(num_rows), T)
    targets = np.sort(batch.targets[batch.target_mask == 1])
    reached = np.arange(1, num_rows * T + 1)
    np.testing.assert_array_equal(targets, np.setdiff1d(reached, offsets))
    assert 1 <= len(tokens) - num_rows * T <= T  # the tail, thrown away


def test_targets_never_cross_documents():
    lengths = np.random.default_rng(3).integers(1, 6, 50)
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    batch = pack_rows(np.arange(offsets[-1]), offsets, np.arange(count_rows(offsets[-1], 7)), 7)
    same = document_of[batch.tokens] == document_of[batch.targets]
    np.testing.assert_array_equal(batch.target_mask, same.astype(np.float32))
    same_segment = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    documents = document_of[batch.tokens]
    np.testing.assert_array_equal(same_segment, documents[:, :, None] == documents[:, None, :])


@pytest.mark.parametrize(("num_tokens", "rows"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_count_rows(num_tokens, rows):
    assert count_rows(num_tokens, 4) == rows


@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_outside_of_the_stream(row):
    tokens, offsets = np.arange(13), np.array([0, 13])
    with pytest.raises(ValueError, match=r"expected numbers in 0\.\.2"):
        pack_rows(tokens, offsets, np.array([row]), 4)


def test_padding_has_mask_zero():
    batch = pack_rows(np.arange(1, 14), np.array([0, 6, 13]), np.array([0]), 4)
    padded = pad_rows(batch, 3)
    for name, array in padded._asdict().items():
        np.testing.assert_array_equal(array[:1], getattr(batch, name), err_msg=name)
        assert array.shape == (3, 4) and array.dtype == getattr(batch, name).dtype
    assert not padded.target_mask[1:].any()
    np.testing.assert_array_equal(padded.positions[1:], [[0, 1, 2, 3]] * 2)
    assert pad_rows(batch, 1) is batch


def test_no_rows():
    batch = pack_rows(np.arange(9), np.array([0, 9]), np.array([], np.int64), 4)
    assert batch.tokens.shape == (0, 4)
    assert pad_rows(batch, 2).target_mask.tolist() == [[0.0] * 4] * 2
