"""Documents in files: which files, which split, what text; every way a source can be wrong."""

import gzip
import hashlib
import json
import logging
import os
import sysconfig
from pathlib import Path

import pytest
from support.documents import data_config, random_texts, write_texts

from moda_jax.config import DataConfig
from moda_jax.data import corpus


def read_all(config):
    """{split: {name: text}}, and the bytes that progress was told of."""
    files = corpus.list_files(config)
    split_of, splits = corpus.split_documents(files, config)
    told = []
    texts = {s: dict(corpus.read_documents(files, config, split_of, s, told.append)) for s in splits}
    return texts, sum(told)


def merged(config):
    texts, _ = read_all(config)
    return {name: text for split in texts.values() for name, text in split.items()}


def hash_as_number(name):
    return int.from_bytes(hashlib.blake2b(name, digest_size=6).digest(), "big") / 2**48


def test_files_are_found_in_all_folders(tmp_path):
    write_texts(
        tmp_path,
        {
            "b.txt": b"1",
            "a/c.txt": b"22",
            "a/x/d.jsonl": [],
            "e.jsonl.gz": [],
            "f.md": b"no",
            "txt": b"no",
            "g.gz": b"",
        },
    )
    files = corpus.list_files(DataConfig(source=str(tmp_path)))
    assert [file.name for file in files] == [b"a/c.txt", b"a/x/d.jsonl", b"b.txt", b"e.jsonl.gz"]
    assert files[0].size == 2 and files[0].path == str(tmp_path / "a/c.txt")


def test_linked_folders_are_followed_once(tmp_path):
    write_texts(tmp_path, {"real/here/a.txt": b"a", "source/b.txt": b"b"})
    (tmp_path / "source" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "here" / "loop").symlink_to(tmp_path / "real")
    files = corpus.list_files(DataConfig(source=str(tmp_path / "source")))
    assert [file.name for file in files] == [b"b.txt", b"linked/here/a.txt"]


def test_standard_library():
    files = corpus.list_files(DataConfig())
    names = {file.name for file in files}
    assert {b"os.py", b"json/decoder.py"} <= names
    assert not any(b"site-packages" in name or b"__pycache__" in name for name in names)
    assert sum(file.size for file in files) > 5e6
    assert next(file for file in files if file.name == b"os.py").path == os.path.join(
        sysconfig.get_path("stdlib"), "os.py"
    )


def test_text_is_the_bytes_of_the_file(tmp_path):
    texts = {"a.txt": b"\xff\x00\r\n \xef\xbb\xbf", "b/ü.txt": "ü".encode()}
    write_texts(tmp_path, texts)
    assert merged(DataConfig(source=str(tmp_path))) == {b"a.txt": texts["a.txt"], "b/ü.txt".encode(): "ü".encode()}


def test_json_lines(tmp_path):
    records = [{"text": "one\nline", "id": 1}, {"id": 2, "text": "ü\ud83d"}, {"text": ""}]
    lines = json.dumps(records[0]).encode() + b"\n\n  \r\n" + b"\n".join(json.dumps(r).encode() for r in records[1:])
    (tmp_path / "a.jsonl").write_bytes(lines + b'\n{"text": "raw \xff"}')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    expected = {1: b"one\nline", 4: "ü".encode() + b"\xed\xa0\xbd", 5: b""}
    want = {f"{file}:{line}".encode(): text for file in ("a.jsonl", "b.jsonl.gz") for line, text in expected.items()}
    assert merged(DataConfig(source=str(tmp_path))) == {**want, b"a.jsonl:6": b"raw \xff"}


def test_another_text_field(tmp_path):
    write_texts(tmp_path, {"a.jsonl": [{"body": "x"}, {"body": "y"}]})
    assert set(merged(DataConfig(source=str(tmp_path), feature="body")).values()) == {b"x", b"y"}


def test_split_is_by_hash_of_the_name_alone(tmp_path):
    texts = random_texts(60) | {"lines.jsonl": [{"text": str(i)} for i in range(60)]}
    names = {name.encode() for name in texts if name.endswith("txt")}
    names |= {b"lines.jsonl:%d" % line for line in range(1, 61)}
    for folder in ("here", "there"):
        config = DataConfig(source=str(write_texts(tmp_path / folder, texts)), validation_fraction=0.3)
        splits, told = read_all(config)
        assert set(splits["validation"]) == {name for name in names if hash_as_number(name) < 0.3}
        assert set(splits["train"]) == {name for name in names if hash_as_number(name) >= 0.3}
        assert told == 2 * sum(file.size for file in corpus.list_files(config))


def test_split_is_stable_across_machines():
    assert corpus.name_hash(b"os.py") == hash_as_number(b"os.py")
    assert corpus.name_hash(b"os.py") == pytest.approx(0.2491351944867, abs=1e-12)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_no_split_of_two_documents_is_empty(tmp_path, fraction, caplog):
    config = DataConfig(source=str(write_texts(tmp_path, random_texts(8))), validation_fraction=fraction)
    with caplog.at_level(logging.WARNING, "moda_jax"):
        splits, _ = read_all(config)
    small, large = ("validation", "train") if fraction < 0.5 else ("train", "validation")
    assert len(splits[small]) == 1 and len(splits[large]) == 7
    hashes = {name: hash_as_number(name) for names in splits.values() for name in names}
    (moved,) = splits[small]
    assert hashes[moved] == (min if small == "validation" else max)(hashes.values())
    assert f"leaves no document for the {small} split; {os.fsdecode(moved)} goes there" in caplog.text


def test_one_document_is_for_training(tmp_path):
    splits, _ = read_all(DataConfig(source=str(write_texts(tmp_path, {"a.txt": b"a"}))))
    assert splits == {"train": {b"a.txt": b"a"}}


class TestErrors:
    def check(self, source, message, **fields):
        with pytest.raises(ValueError, match=message):
            read_all(DataConfig(source=str(source), **fields))

    def test_no_such_directory(self, tmp_path):
        self.check(tmp_path / "no", rf"data\.source='{tmp_path}/no': no such directory; expected 'python_stdlib'")

    def test_a_file(self, tmp_path):
        write_texts(tmp_path, {"a.txt": b"a"})
        self.check(tmp_path / "a.txt", r"data\.source=.*a\.txt': is no directory")

    def test_no_usable_file(self, tmp_path):
        write_texts(tmp_path, {"a.md": b"a"})
        self.check(tmp_path, r"data\.source=.*holds no file that ends in \.txt, \.jsonl, \.jsonl\.gz")

    def test_no_document(self, tmp_path):
        write_texts(tmp_path, {"a.jsonl": b"\n\n"})
        self.check(tmp_path, r"data\.source=.*its 1 files hold no document")

    def test_broken_link(self, tmp_path):
        (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
        self.check(tmp_path, r"data\.source=.*a\.txt cannot be read \(No such file")

    def test_a_pipe_is_refused_instead_of_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "a.txt")
        self.check(tmp_path, r"data\.source=.*a\.txt cannot be read \(not a regular file\)")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b'{"text": ', r"data\.source=.*a\.jsonl, line 2 is not JSON"),
            (b"[1]", r"data\.source=.*a\.jsonl, line 2 is a JSON list; expected an object"),
            (b'{"id": 1, "body": 2}', r"data\.feature='text': .*line 2 has no such field; it has \['body', 'id'\]"),
            (b'{"text": null}', r"data\.feature='text': .*line 2 holds a NoneType there; expected a string"),
        ],
    )
    def test_bad_lines(self, tmp_path, line, message):
        write_texts(tmp_path, {"a.jsonl": b'{"text": "fine"}\n' + line + b"\n"})
        self.check(tmp_path, message)

    def test_a_gzip_file_cut_off(self, tmp_path):
        whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(1000)))
        write_texts(tmp_path, {"b.txt": b""})
        (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
        self.check(tmp_path, r"data\.source=.*a\.jsonl\.gz cannot be read \(Compressed file ended")

    def test_no_gzip_file(self, tmp_path):
        (tmp_path / "a.jsonl.gz").write_bytes(b'{"text": "plain"}\n')
        self.check(tmp_path, r"data\.source=.*a\.jsonl\.gz cannot be read \(Not a gzipped file")

    def test_files_that_change_under_the_reader(self, tmp_path):
        config = data_config(write_texts(tmp_path, {"a.txt": b"a", "b.txt": b"b"}), tmp_path)
        files = corpus.list_files(config)
        Path(tmp_path / "a.txt").write_bytes(b"longer")
        with pytest.raises(ValueError, match=r"a\.txt changed while it was read \(1 bytes, then 6\)"):
            list(corpus.read_documents(files, config, lambda name: "train", "train"))
        Path(tmp_path / "a.txt").unlink()
        with pytest.raises(ValueError, match=r"data\.source=.*a\.txt cannot be read \(.*No such file"):
            list(corpus.read_documents(files, config, lambda name: "train", "train"))

    def test_a_document_too_large(self, tmp_path):
        write_texts(tmp_path, {"a.txt": b"a" * 11})
        message = r"data\.source=.*a\.txt is a document of 11 bytes; expected at most data\.max_document_bytes=10"
        self.check(tmp_path, message, max_document_bytes=10)
