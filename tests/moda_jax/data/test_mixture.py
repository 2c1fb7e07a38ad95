"""A mixture's rows: shares, order, resume, processes, fingerprint, validation."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from support.documents import data_config, random_texts, write_texts

from moda_jax.data import sources as sources_lib
from moda_jax.data.mixture import MixedOrder
from moda_jax.data.packing import Batch, pack_rows
from moda_jax.data.pipeline import open_dataset, train_batches, validation_batches
from moda_jax.data.sources import find_split
from moda_jax.data.tokenizer import ByteTokenizer

T = 16


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two corpora of different texts, and the section that mixes them 3 to 1."""
    directory = tmp_path_factory.mktemp("mixture")
    for name, seed in (("a", 0), ("b", 1)):
        write_texts(directory / name, {f"{name}{path}": text for path, text in random_texts(40, seed=seed).items()})
    return data_config(f"0.75*{directory / 'a'} + 0.25*{directory / 'b'}", directory / "cache", sequence_length=T)


@pytest.fixture(scope="module")
def mixture(places):
    return open_dataset(places, "train", ByteTokenizer())


def alone(config, number):
    return config.of_one(config.sources[number].source)


def take(dataset, config, number, **arguments):
    with train_batches(dataset, config, **{"batch_size": 4, "seed": 0} | arguments) as batches:
        return [next(batches) for _ in range(number)]


def join(batches):
    return Batch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))


def assert_equal(batch, other):
    for name in Batch._fields:
        np.testing.assert_array_equal(getattr(batch, name), getattr(other, name), err_msg=name)


def origins(mixture, batch):
    """Of each row its source and its number there, found by its tokens."""
    known = {}
    for k, part in enumerate(mixture.parts):
        rows = pack_rows(part.tokens, part.offsets, np.arange(part.num_rows(T)), T)
        known |= {row.tobytes(): (k, i) for i, row in enumerate(rows.tokens)}
    assert len(known) == sum(part.num_rows(T) for part in mixture.parts)
    return [known[row.tobytes()] for row in batch.tokens]


def plain_order(rows, length):
    """The definition, with fractions: in a period each source's rows are spread evenly."""
    slots = sorted((Fraction(2 * j + 1, 2 * n), k, j) for k, n in enumerate(rows) for j in range(n))
    expected = []
    for place in range(length):
        _, source, rank = slots[place % len(slots)]
        expected.append((source, place // len(slots) * rows[source] + rank))
    return expected


@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 1), (7, 3), (2, 3, 5), (1, 1, 97), (333, 667)])
def test_the_order_is_the_plain_one(rows):
    order = MixedOrder(rows)
    length = 2 * sum(rows) + 3
    sources, numbers = order.locate(np.arange(length))
    expected = plain_order(rows, length)
    assert list(zip(sources.tolist(), numbers.tolist(), strict=True)) == expected
    for k, n in enumerate(rows):
        own = numbers[sources == k]
        assert own.tolist() == list(range(len(own)))  # every row of a source in turn
        for number in (0, n - 1, n):
            assert expected[order.place_of(k, number)] == (k, number)
    for count in (0, 1, sum(rows), length):
        assert order.counts(count) == [sum(source == k for source, _ in expected[:count]) for k in range(len(rows))]


def test_far_places_are_found_without_counting():
    order = MixedOrder((7, 3))
    sources, numbers = order.locate(np.array([10**15, 10**15 + 9]))
    assert list(zip(sources.tolist(), numbers.tolist(), strict=True)) == [(0, 7 * 10**14), (0, 7 * 10**14 + 6)]


@pytest.mark.parametrize("rows", [(7, 3), (2, 3, 5), (1, 1, 98)])
def test_no_stretch_is_far_from_its_share(rows):
    sources, _ = MixedOrder(rows).locate(np.arange(3 * sum(rows)))
    for k, n in enumerate(rows):
        seen = np.concatenate([[0], np.cumsum(sources == k)])
        for length in (4, 10, 16):
            found = seen[length:] - seen[:-length]
            assert np.abs(found - length * n / sum(rows)).max() < len(rows)


def test_the_sources_come_in_their_shares_each_row_once_an_epoch(mixture, places):
    epoch = mixture.parts[1].num_rows(T)  # of the source with a quarter
    batch = join(take(mixture, places, epoch, batch_size=4))
    found = origins(mixture, batch)
    assert [sum(source == k for source, _ in found) for k in (0, 1)] == [3 * epoch, epoch]
    assert sorted(row for source, row in found if source == 1) == list(range(epoch))
    again = [row for source, row in origins(mixture, join(take(mixture, places, epoch, position=4 * epoch))) if source]
    assert sorted(again) == list(range(epoch)) and again != [row for source, row in found if source]


def test_a_row_is_that_of_the_source_alone(mixture, places):
    batch = join(take(mixture, places, 3))
    for k, row in zip(range(12), origins(mixture, batch), strict=True):
        part = mixture.parts[row[0]]
        expected = pack_rows(part.tokens, part.offsets, np.array([row[1]]), T)
        assert_equal(Batch(*(array[k : k + 1] for array in batch)), expected)


def test_it_goes_on_from_any_place(mixture, places):
    straight = take(mixture, places, 12)
    for position in (4, 20, 7 * 4):
        assert_equal(join(take(mixture, places, 3, position=position)), join(straight[position // 4 :][:3]))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_have_the_batches_of_one(mixture, places, processes):
    one = take(mixture, places, 3)
    shares = [take(mixture, places, 3, process_index=p, process_count=processes) for p in range(processes)]
    for number, batch in enumerate(one):
        assert_equal(join([share[number] for share in shares]), batch)


def test_the_seed_orders_every_source(mixture, places):
    first, other = (origins(mixture, join(take(mixture, places, 12, seed=seed))) for seed in (0, 1))
    assert [source for source, _ in first] == [source for source, _ in other]
    for k in (0, 1):
        assert [row for source, row in first if source == k] != [row for source, row in other if source == k]


def test_the_first_source_is_in_the_order_that_it_has_alone(mixture, places):
    found = [row for source, row in origins(mixture, join(take(mixture, places, 8))) if source == 0]
    with train_batches(mixture.parts[0], places, batch_size=1, seed=0) as batches:
        own = [origins(mixture, next(batches))[0][1] for _ in found]
    assert found == own


def test_the_cache_is_that_of_the_sources(mixture, places, monkeypatch):
    """What one source prepared alone is found by the mixture, and the other way round."""
    monkeypatch.setattr(sources_lib, "prepare_once", None)
    for k, part in enumerate(mixture.parts):
        assert open_dataset(alone(places, k), "train", ByteTokenizer()).fingerprint == part.fingerprint


def test_the_fingerprint_is_of_data_and_shares(mixture, places):
    (_, a), (_, b) = places.sources

    def fingerprint(source):
        return open_dataset(dataclasses.replace(places, source=source), "train", ByteTokenizer()).fingerprint

    assert fingerprint(f"3*{a} + 1*{b}") == mixture.fingerprint  # the same shares, written otherwise
    others = {fingerprint(f"1*{a} + 1*{b}"), fingerprint(f"1*{b} + 3*{a}"), fingerprint(a), mixture.fingerprint}
    assert len(others) == 4


def test_validation_has_the_shares_of_training_and_no_row_twice(places):
    mixture = open_dataset(places, "validation", ByteTokenizer())
    sizes = [part.num_rows(T) for part in mixture.parts]
    whole = list(validation_batches(mixture, places, batch_size=4))
    found = [origin for batch in whole for origin in origins(mixture, without_padding(batch))]
    assert len(set(found)) == len(found)
    counts = [sum(source == k for source, _ in found) for k in (0, 1)]
    assert counts[0] in (3 * counts[1], 3 * counts[1] + 1, 3 * counts[1] + 2)
    assert counts[0] == sizes[0] or counts[1] == sizes[1]  # until one is exhausted
    some = list(validation_batches(mixture, places, batch_size=4, num_batches=2))
    rows = origins(mixture, join(some))
    assert [sum(source == k for source, _ in rows) for k in (0, 1)] == [6, 2]
    assert [row for source, row in rows if source == 0] == [i * sizes[0] // 6 for i in range(6)]  # spread evenly
    assert [row for source, row in rows if source == 1] == [0, sizes[1] // 2]


def without_padding(batch):
    return Batch(*(array[batch.target_mask.any(axis=1)] for array in batch))


def test_a_source_that_is_missing_or_too_small_is_named_alone(places, tmp_path):
    (_, a), _ = places.sources
    with pytest.raises(ValueError, match=rf"data\.source='{tmp_path}/no': no such file or directory"):
        open_dataset(dataclasses.replace(places, source=f"1*{a} + 1*{tmp_path}/no"), "train", ByteTokenizer())
    write_texts(tmp_path / "small", {"1.txt": b"ab", "2.txt": b"cd", "3.txt": b"ef"})
    with pytest.raises(ValueError, match=rf"data\.source='{tmp_path}/small': the train split has \d+ tokens in"):
        open_dataset(dataclasses.replace(places, source=f"1*{a} + 1*{tmp_path}/small"), "train", ByteTokenizer())
    with pytest.raises(ValueError, match=r"data\.source='0\.75\*.*': is a mixture; expected one source here"):
        find_split(places, "train")
