"""From a config to batches: preparation and its cache, order, resume, processes, validation, threads."""

import os
import shutil
import threading
import time

import numpy as np
import pytest
from support.documents import data_config, random_texts, start_python, write_texts

from moda_jax.config import DataConfig
from moda_jax.data import sources
from moda_jax.data.packing import Batch, pack_rows
from moda_jax.data.pipeline import open_dataset, train_batches, validation_batches
from moda_jax.data.tokenizer import ByteTokenizer

T = 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A small corpus: its data section and its train split."""
    directory = tmp_path_factory.mktemp("pipeline")
    config = data_config(write_texts(directory / "texts", random_texts(60)), directory / "cache", sequence_length=T)
    return config, open_dataset(config, "train", ByteTokenizer())


def take(dataset, config, number, **arguments):
    """The first batches, and the position after them."""
    with train_batches(dataset, config, **{"batch_size": 4, "seed": 0} | arguments) as batches:
        return [next(batches) for _ in range(number)], batches.position


def join(batches):
    return Batch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))


def assert_equal(batch, other):
    for name in Batch._fields:
        np.testing.assert_array_equal(getattr(batch, name), getattr(other, name), err_msg=name)


def row_order(dataset, config, number, **arguments):
    """The numbers of the rows that come, found by their tokens."""
    everything = pack_rows(dataset.tokens, dataset.offsets, np.arange(dataset.num_rows(T)), T)
    numbers = {row.tobytes(): i for i, row in enumerate(everything.tokens)}
    assert len(numbers) == len(everything.tokens)
    batches, _ = take(dataset, config, number, batch_size=1, **arguments)
    return [numbers[batch.tokens.tobytes()] for batch in batches]


class TestPreparation:
    def test_documents_are_those_of_the_files(self, prepared):
        config, _ = prepared
        texts = []
        for split in ("train", "validation"):
            dataset = open_dataset(config, split, ByteTokenizer())
            bounds = zip(dataset.offsets, dataset.offsets[1:], strict=False)
            texts += [dataset.tokens[a : b - 1].astype(np.uint8).tobytes() for a, b in bounds]
            assert (dataset.tokens[dataset.offsets[1:] - 1] == 256).all()
        assert sorted(texts) == sorted(random_texts(60).values())

    def test_found_again_without_reading(self, prepared, monkeypatch):
        config, dataset = prepared
        monkeypatch.setattr(sources, "prepare_once", None)
        assert open_dataset(config, "train", ByteTokenizer()).fingerprint == dataset.fingerprint

    def test_a_changed_directory_is_prepared_anew(self, tmp_path):
        texts = random_texts(12)
        config = data_config(write_texts(tmp_path / "texts", texts), tmp_path / "cache", validation_fraction=1e-6)
        seen = [open_dataset(config, "train", ByteTokenizer()).fingerprint]
        path = tmp_path / "texts" / "0/0.txt"
        status = path.stat()
        for change in ("same size, later", "one file more", "one file less"):
            if change == "same size, later":
                path.write_bytes(b"x" * status.st_size)
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
            elif change == "one file more":
                (tmp_path / "texts" / "new.txt").write_bytes(b"new")
            else:
                (tmp_path / "texts" / "1/1.txt").unlink()
            seen.append(open_dataset(config, "train", ByteTokenizer()).fingerprint)
        assert len(set(seen)) == len(seen)

    def test_fingerprint_does_not_depend_on_the_machine(self, prepared, tmp_path):
        config, dataset = prepared
        elsewhere = data_config(shutil.copytree(config.source, tmp_path / "moved"), tmp_path / "cache")
        assert open_dataset(elsewhere, "train", ByteTokenizer()).fingerprint == dataset.fingerprint
        assert open_dataset(elsewhere, "validation", ByteTokenizer()).fingerprint != dataset.fingerprint

    def test_json_lines_and_text_beside_each_other(self, tmp_path):
        lines = [{"text": f"line {i}"} for i in range(40)]
        write_texts(tmp_path / "texts", {"a.jsonl.gz": lines, "b.jsonl": lines, "c.txt": b"a file"})
        config = data_config(tmp_path / "texts", tmp_path / "cache", validation_fraction=0.2)
        split = [open_dataset(config, split, ByteTokenizer()) for split in ("train", "validation")]
        assert sum(dataset.num_documents for dataset in split) == 81 and split[1].num_documents > 1

    def test_standard_library_can_be_prepared(self, tmp_path, monkeypatch):
        """The real thing, cut to one package: the whole one takes seconds on an idle machine, longer on a busy one."""
        from moda_jax.data import corpus

        whole = corpus.list_files
        monkeypatch.setattr(corpus, "list_files", lambda c: [f for f in whole(c) if f.name.startswith(b"json/")])
        config = DataConfig(cache_dir=str(tmp_path), validation_fraction=0.4, sequence_length=64)
        dataset = open_dataset(config, "train", ByteTokenizer())
        assert b"json" in dataset.tokens[: dataset.offsets[1]].astype(np.uint8).tobytes().lower()

    @pytest.mark.parametrize(
        ("texts", "split", "message"),
        [
            ({"a.jsonl": [{"text": "x" * 16}]}, "train", r"the train split has 17 tokens in 1 documents.*=17 needs 18"),
            ({"a.txt": b""}, "train", r"the train split has 0 tokens in 0 documents, too few for one row"),
            ({"a.jsonl": [{"text": "x" * 99}]}, "validation", r"holds a single document; two splits need at least two"),
        ],
    )
    def test_splits_that_are_too_small(self, tmp_path, texts, split, message):
        config = data_config(write_texts(tmp_path / "texts", texts), tmp_path / "cache", sequence_length=17)
        with pytest.raises(ValueError, match=rf"data\.source='{tmp_path}/texts': {message}"):
            open_dataset(config, split, ByteTokenizer())

    def test_unknown_split(self, prepared):
        with pytest.raises(ValueError, match=r"split='test': expected one of \('train', 'validation'\)"):
            open_dataset(prepared[0], "test", ByteTokenizer())


class TestOrder:
    def test_an_epoch_has_every_row_once_and_the_next_another_order(self, prepared):
        config, dataset = prepared
        R = dataset.num_rows(T)
        order = row_order(dataset, config, 2 * R + 3)
        assert sorted(order[:R]) == sorted(order[R : 2 * R]) == list(range(R))
        assert order[:R] != order[R : 2 * R] != list(range(R))

    def test_seeds_give_unrelated_orders(self, prepared):
        config, dataset = prepared
        R = dataset.num_rows(T)
        first, second = (row_order(dataset, config, 2 * R, seed=seed) for seed in (0, 1))
        assert len({tuple(order) for order in (first[:R], first[R:], second[:R], second[R:])}) == 4
        assert row_order(dataset, config, R, seed=2**40) != first[:R]

    def test_without_shuffle(self, prepared):
        config, dataset = prepared
        R = dataset.num_rows(T)
        config = DataConfig(shuffle=False, sequence_length=T)
        assert row_order(dataset, config, R + 2) == [*range(R), 0, 1]

    def test_a_batch_holds_rows_of_two_epochs(self, prepared):
        """Nothing is dropped at an epoch's end."""
        config, dataset = prepared
        R = dataset.num_rows(T)
        B = 7
        assert R % B
        batches, position = take(dataset, config, R // B + 2, batch_size=B)
        singles, _ = take(dataset, config, position, batch_size=1)
        assert_equal(join(batches), join(singles))

    def test_one_row(self, tmp_path):
        config = data_config(write_texts(tmp_path / "texts", {"a.jsonl": [{"text": "x" * T}]}), tmp_path / "cache")
        dataset = open_dataset(config, "train", ByteTokenizer())
        batches, position = take(dataset, config, 3)
        assert position == 12
        assert (join(batches).tokens == ord("x")).all() and (join(batches).targets[:, -1] == 256).all()


class TestResume:
    @pytest.mark.parametrize("stop", [0, 1, 5, 40])
    def test_goes_on_exactly(self, prepared, stop):
        config, dataset = prepared
        straight, end = take(dataset, config, stop + 4)
        _, position = take(dataset, config, stop)
        assert position == 4 * stop and type(position) is int
        resumed, end_again = take(dataset, config, 4, position=position)
        assert end == end_again
        assert_equal(join(resumed), join(straight[stop:]))

    @pytest.mark.parametrize("process_count", [1, 2, 4])
    def test_with_another_number_of_processes(self, prepared, process_count):
        config, dataset = prepared
        straight, _ = take(dataset, config, 6)
        shares = [
            take(dataset, config, 3, position=12, process_index=p, process_count=process_count)
            for p in range(process_count)
        ]
        assert {position for _, position in shares} == {24}
        for k in range(3):
            assert_equal(join([batches[k] for batches, _ in shares]), straight[3 + k])

    def test_a_position_between_batches(self, prepared):
        config, dataset = prepared
        straight, _ = take(dataset, config, 5)
        resumed, _ = take(dataset, config, 1, position=3, batch_size=6)
        assert_equal(resumed[0], Batch(*(array[3:9] for array in join(straight))))

    def test_prefetch_changes_nothing(self, prepared):
        config, dataset = prepared
        straight, _ = take(dataset, config, 9)
        other = DataConfig(sequence_length=T, prefetch_batches=1)
        assert_equal(join(take(dataset, other, 9)[0]), join(straight))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"process_count": 3}, r"batch_size=4: expected a positive multiple of process_count=3"),
            ({"batch_size": 0}, r"batch_size=0: expected a positive multiple"),
            ({"process_index": 2, "process_count": 2}, r"process_index=2: expected a number in 0\.\.1"),
            ({"position": -1}, r"position=-1: expected a number >= 0"),
            ({"seed": -1}, r"seed=-1: expected a number >= 0"),
        ],
    )
    def test_wrong_arguments(self, prepared, arguments, message):
        config, dataset = prepared
        with pytest.raises(ValueError, match=message):
            train_batches(dataset, config, **{"batch_size": 4, "seed": 0} | arguments)

    def test_rows_too_long_for_the_split(self, prepared):
        _, dataset = prepared
        with pytest.raises(ValueError, match=r"data\.sequence_length=1000000: gives 0 rows"):
            train_batches(dataset, DataConfig(sequence_length=10**6), batch_size=1, seed=0)


class TestValidation:
    @pytest.mark.parametrize("process_count", [1, 2, 4])
    def test_one_pass_in_order_the_last_batch_padded(self, prepared, process_count):
        config, dataset = prepared
        R = dataset.num_rows(T)
        assert R % 8
        arguments = {"batch_size": 8, "process_count": process_count}
        shares = [list(validation_batches(dataset, config, process_index=p, **arguments)) for p in range(process_count)]
        assert {len(share) for share in shares} == {-(-R // 8)}
        rows = join([join(parts) for parts in zip(*shares, strict=True)])
        everything = pack_rows(dataset.tokens, dataset.offsets, np.arange(R), T)
        assert_equal(Batch(*(array[:R] for array in rows)), everything)
        assert len(rows.tokens) > R and not rows.target_mask[R:].any()

    @pytest.mark.parametrize(("asked", "given"), [(1, 1), (3, 3), (10**6, None)])
    def test_some_batches(self, prepared, asked, given):
        config, dataset = prepared
        batches = list(validation_batches(dataset, config, batch_size=8, num_batches=asked))
        assert len(batches) == (given or -(-dataset.num_rows(T) // 8))

    def test_some_batches_are_spread_evenly_over_the_split(self, prepared):
        config, dataset = prepared
        R = dataset.num_rows(T)
        assert R > 24
        rows = join(list(validation_batches(dataset, config, batch_size=8, num_batches=3)))
        assert_equal(rows, pack_rows(dataset.tokens, dataset.offsets, np.arange(24) * R // 24, T))

    def test_wrong_arguments(self, prepared):
        config, dataset = prepared
        with pytest.raises(ValueError, match=r"num_batches=-1: expected a number >= 0"):
            validation_batches(dataset, config, batch_size=8, num_batches=-1)
        with pytest.raises(ValueError, match=r"batch_size=8: expected a positive multiple of process_count=3"):
            validation_batches(dataset, config, batch_size=8, process_count=3)


class TestThreads:
    def reading(self):
        return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]

    def wait_until_none(self):
        end = time.monotonic() + 20
        while self.reading() and time.monotonic() < end:
            time.sleep(0.01)
        assert not self.reading()

    def test_close_ends_them(self, prepared):
        config, dataset = prepared
        self.wait_until_none()
        batches = train_batches(dataset, config, batch_size=4, seed=0)
        next(batches)
        assert self.reading()
        batches.close()
        self.wait_until_none()
        with pytest.raises(ValueError):
            next(batches)
        assert batches.position == 4

    def test_a_validation_pass_that_is_left_early(self, prepared):
        config, dataset = prepared
        for _ in validation_batches(dataset, config, batch_size=4):
            break
        self.wait_until_none()
        assert not self.reading()

    @pytest.mark.slow
    @pytest.mark.timeout(120)
    def test_an_interpreter_ends_with_batches_open(self, prepared):
        code = """
import sys
from moda_jax.config import DataConfig
from moda_jax.data.pipeline import open_dataset, train_batches
from moda_jax.data.tokenizer import ByteTokenizer

config = DataConfig(source=sys.argv[1], cache_dir=sys.argv[2], sequence_length=16)
batches = train_batches(open_dataset(config, "train", ByteTokenizer()), config, batch_size=4, seed=0)
next(batches)
print("position", batches.position)
"""
        config, _ = prepared
        process = start_python(code, config.source, config.cache_dir)
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out) == (0, "position 4\n"), err
        assert "Traceback" not in err and "Tokenizing" not in err
