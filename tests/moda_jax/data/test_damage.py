"""Damaged data, end to end: refused at start by name, or left out with a count and a name; never a hang, never other
data than what is left."""

import dataclasses
import gzip
import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from support.documents import data_config, start_python, write_texts, write_tfds

from moda_jax.config import DataConfig
from moda_jax.data.damage import DamageError, read_skipped
from moda_jax.data.file_guard import DataLostError, FileGuard
from moda_jax.data.pipeline import open_dataset, train_batches
from moda_jax.data.tokenizer import ByteTokenizer

GOOD = {f"good/{i}.txt": f"document {i}".encode() for i in range(20)}
LONG = 200 * 10**6


class Utf8Tokenizer(ByteTokenizer):
    """Bytes that want to be text."""

    needs_utf8 = True
    fingerprint = "bytes that want to be text"


def texts_of(dataset):
    """The documents, back from their tokens."""
    bounds = zip(dataset.offsets, dataset.offsets[1:], strict=False)
    return {dataset.tokens[a:b][:-1].astype(np.uint8).tobytes() for a, b in bounds}


def both_splits(config, tokenizer):
    """All documents, and all that was left out: {name: reason}."""
    texts, skipped = set(), {}
    for split in ("train", "validation"):
        dataset = open_dataset(dataclasses.replace(config, sequence_length=4), split, tokenizer)
        texts |= texts_of(dataset)
        skipped |= read_skipped(Path(dataset.tokens.filename).parent)
    return texts, skipped


def gzip_of(count):
    return gzip.compress(b"".join(b'{"text": "line %d"}\n' % i for i in range(count)))


def write_long_line(path, before, after):
    with path.open("wb") as file:
        file.write(before)
        block = b"x" * 10**6
        for _ in range(LONG // len(block)):
            file.write(block)
        file.write(after)


def spoil_utf8(directory):
    (directory / "bad.txt").write_bytes(b"caf\xe9")
    return {"bad.txt": "not valid UTF-8 (unexpected end of data at byte 3)"}, set()


def spoil_json(directory):
    (directory / "a.jsonl").write_bytes(b'{"text": "first"}\n{"text": \n{"text": "third"}\n{"id": 3}\n')
    return {"a.jsonl:2": "is not JSON", "a.jsonl:4": "has no such field"}, {b"first", b"third"}


def spoil_nesting(directory):
    (directory / "a.jsonl").write_bytes(b'{"text": "first"}\n{"text": ' + b"[" * 10**5 + b'\n{"text": "third"}\n')
    return {"a.jsonl:2": "is JSON that is nested too deeply"}, {b"first", b"third"}


def spoil_download(directory):
    (directory / "a.jsonl.gz").write_bytes(b"")
    return {"a.jsonl.gz": "its download was cut off"}, set()


def spoil_pointer(directory):
    (directory / "a.txt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n")
    return {"a.txt": "is a Git LFS pointer"}, set()


def spoil_gzip(directory):
    whole = gzip_of(3000)
    (directory / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return {"cut.jsonl.gz": "lines before that could"}, None


def spoil_link(directory):
    (directory / "gone.txt").symlink_to(directory / "nowhere")
    return {}, set()


def long_line(directory):
    write_long_line(directory / "long.jsonl", b'{"text": "before"}\n{"text": "', b'"}\n{"text": "after"}\n')
    return {"long.jsonl:2": f"is a line of {LONG + 13} bytes; expected at most"}, {b"before", b"after"}


def long_file(directory):
    with (directory / "long.txt").open("wb") as file:
        file.truncate(LONG)
    return {"long.txt": f"is a document of {LONG} bytes; expected at most data.max_document_bytes=67108864"}, set()


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_utf8, spoil_json, spoil_nesting, spoil_download, spoil_pointer, spoil_gzip, spoil_link, long_line,
        long_file,
    ],
)  # fmt: skip
def test_damage_is_refused_or_left_out_by_name(tmp_path, caplog, spoil):
    source = write_texts(tmp_path / "source", GOOD)
    damaged, others = spoil(source)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"^data\.(source|feature|on_invalid_utf8)"):
        for split in ("train", "validation"):
            open_dataset(
                data_config(source, tmp_path / "cache", on_damage="fail", on_invalid_utf8="fail"),
                split,
                Utf8Tokenizer(),
            )
    assert not list((tmp_path / "cache").glob("datasets/*/text_corpus")) or spoil is spoil_utf8
    config = data_config(source, tmp_path / "cache", on_damage="skip", on_invalid_utf8="skip")
    with caplog.at_level(logging.INFO, "moda_jax"):
        texts, skipped = both_splits(config, Utf8Tokenizer())
    assert time.monotonic() - began < 60
    assert set(skipped) == set(damaged)
    for name, reason in damaged.items():
        assert reason in skipped[name]
        assert name in caplog.text and "DOCUMENTS LEFT OUT" in caplog.text
    if others is None:
        lines = texts - set(GOOD.values())
        assert lines == {b"line %d" % i for i in range(len(lines))}  # whole lines from the beginning
        assert f"{len(lines)} lines before that could" in skipped["cut.jsonl.gz"] and len(lines) > 100
    else:
        assert texts == set(GOOD.values()) | others
    if spoil is spoil_link:
        assert "gone.txt: left out, because it cannot be read (No such file or directory)" in caplog.text


def test_a_sound_source_is_the_same_under_both_policies(tmp_path):
    source = write_texts(tmp_path / "source", GOOD | {"a.jsonl": [{"text": "ü"}, {"text": ""}], "empty.txt": b""})
    fingerprints = set()
    for policy in ("fail", "skip"):
        config = data_config(source, tmp_path / "cache", on_damage=policy, on_invalid_utf8=policy)
        texts, skipped = both_splits(config, Utf8Tokenizer())
        assert texts == set(GOOD.values()) | {"ü".encode()}
        assert skipped == {"a.jsonl:2": "empty", "empty.txt": "empty"}
        fingerprints.add(open_dataset(config, "train", Utf8Tokenizer()).fingerprint)
    assert len(fingerprints) == 1


def test_a_file_removed_while_the_corpus_is_read(tmp_path, monkeypatch):
    from moda_jax.data import corpus

    source = write_texts(tmp_path / "source", GOOD)
    list_files = corpus.list_files

    def list_and_remove(config):
        files = list_files(config)
        (source / "good/7.txt").unlink(missing_ok=True)
        return files

    for policy in ("fail", "skip"):
        (source / "good/7.txt").write_bytes(GOOD["good/7.txt"])
        config = data_config(source, tmp_path / "cache", on_damage=policy)
        with monkeypatch.context() as patch:
            patch.setattr(corpus, "list_files", list_and_remove)
            if policy == "fail":
                with pytest.raises(DamageError, match=r"good/7\.txt cannot be read \(.*No such file"):
                    both_splits(config, ByteTokenizer())
            else:
                from moda_jax.data import sources

                directory = sources.find_split(config, "train").open()
                assert set(directory.skipped) == {"good/7.txt"} and "No such file" in directory.skipped["good/7.txt"]


class TestArrayRecord:
    @pytest.fixture
    def record(self, tmp_path):
        """A TFDS dataset that others prepared, and the one file of its training split."""
        rows = [{"text": f"document {i} " + "abc" * (i % 50)} for i in range(2000)]
        place = write_tfds(
            tmp_path / "data", {"text": tfds.features.Text()}, {"train": rows, "validation": rows[:20]}
        )  # fmt: skip
        (path,) = place.glob("*train*")
        self.documents = {row["text"].encode() for row in rows}
        return path

    def open(self, record, tmp_path, **fields):
        config = data_config(tmp_path, tmp_path / "cache", **{"source": f"tfds:{record.parent}"} | fields)
        return open_dataset(config, "train", ByteTokenizer())

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
    def test_cut_off(self, record, tmp_path, share):
        os.truncate(record, int(share * record.stat().st_size))
        with pytest.raises(ValueError, match=r"data\.source: record 0 of the split 'train' in .* cannot be read"):
            self.open(record, tmp_path)
        with pytest.raises(ValueError, match=r"data\.source=.*: the train split has 0 tokens"):
            self.open(record, tmp_path, on_damage="skip")

    def test_gone(self, record, tmp_path):
        record.unlink()
        with pytest.raises(ValueError, match=r"data\.source: record 0 of .* cannot be read \(.*No such file"):
            self.open(record, tmp_path)

    def test_flipped_bits_lose_records_and_never_change_one(self, record, tmp_path, caplog):
        whole, random, lost = record.read_bytes(), np.random.default_rng(0), 0
        used = len(whole.rstrip(b"\0"))
        for _ in range(6):
            spoiled = bytearray(whole)
            spoiled[random.integers(used // 10, used * 9 // 10)] ^= 1 << random.integers(8)
            record.write_bytes(spoiled)
            try:
                dataset = self.open(record, tmp_path, on_damage="skip")
            except ValueError as error:  # nothing is left of this file
                assert "has 0 tokens" in str(error)
                continue
            texts = texts_of(dataset)
            assert texts <= self.documents
            missing = len(self.documents) - len(texts)
            lost += missing
            if missing:
                assert f"{missing} DOCUMENTS LEFT OUT" in caplog.text
        assert lost > 0


CUT_UNDER_THE_READER = """
import os, sys
from moda_jax.config import DataConfig
from moda_jax.data.file_guard import DataLostError
from moda_jax.data.pipeline import open_dataset, train_batches
from moda_jax.data.tokenizer import ByteTokenizer

config = DataConfig(source=sys.argv[1], cache_dir=sys.argv[2], sequence_length=16)
dataset = open_dataset(config, "train", ByteTokenizer())
batches = train_batches(dataset, config, batch_size=4, seed=0)
next(batches)
os.truncate(dataset.tokens.filename, 128)
try:
    for _ in range(100):
        next(batches)
except DataLostError as error:
    print("lost", error, flush=True)
"""


def test_a_prepared_file_that_is_cut_off_during_the_run_is_an_error_and_not_a_crash(tmp_path):
    texts = {f"{i}.txt": os.urandom(20000) for i in range(4)}
    process = start_python(CUT_UNDER_THE_READER, write_texts(tmp_path / "source", texts), tmp_path / "cache")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert out.startswith("lost ") and "tokens.npy: was changed while the run read it" in out


def test_prepared_and_source_files_may_be_removed_during_the_run(tmp_path):
    config = data_config(write_texts(tmp_path / "source", GOOD), tmp_path / "cache")
    dataset = open_dataset(config, "train", ByteTokenizer())
    with train_batches(dataset, config, batch_size=2, seed=0) as batches:
        expected = [next(batches).tokens for _ in range(30)]
    with train_batches(dataset, config, batch_size=2, seed=0) as batches:
        got = [next(batches).tokens]
        for path in (*(tmp_path / "source").rglob("*.txt"), *(tmp_path / "cache").rglob("*.npy")):
            path.unlink()
        got += [next(batches).tokens for _ in range(29)]
    np.testing.assert_array_equal(got, expected)


def test_a_guard_sees_sizes_and_times(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    guard = FileGuard(path)
    guard.check()
    os.utime(path, ns=(0, 1))
    with pytest.raises(DataLostError, match="file: was changed while the run read it"):
        guard.check()


@pytest.mark.parametrize("field", ["on_damage", "on_invalid_utf8"])
def test_policies_are_checked(field):
    with pytest.raises(ValueError, match=rf"data\.{field}='ignore': expected one of \('fail', 'skip'\)"):
        DataConfig(**{field: "ignore"})
