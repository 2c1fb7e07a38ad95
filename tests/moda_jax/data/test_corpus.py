"""Documents in files: which files, which split, what text; every way a source can be wrong."""

import dataclasses
import gzip
import hashlib
import json
import logging
import os
import sys
import sysconfig
from pathlib import Path

import pytest
from support.documents import data_config, random_texts, write_texts

from moda_jax.config import DataConfig
from moda_jax.data import corpus
from moda_jax.data.damage import DamageError
from moda_jax.data.pipeline import open_dataset
from moda_jax.data.tokenizer import ByteTokenizer


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
    splits, _ = read_all(DataConfig(source=str(write_texts(tmp_path, {"a.jsonl": [{"text": "a"}]}))))
    assert splits == {"train": {b"a.jsonl:1": b"a"}}


TEXTS = {"README.txt": b"read me", "notes.md": b"# notes"}
LINES = [{"text": "one"}, {"text": "two"}]


class TestWhatIsRead:
    def test_every_kind_in_any_spelling(self, tmp_path, caplog):
        names = ("a.jsonl", "b.JSONL", "c.jsonl.gz", "d.json", "e.json.gz", "f.Json")
        write_texts(tmp_path, TEXTS | {name: LINES for name in names})
        write_parquet(tmp_path / "g.parquet", ["one", "two"])
        with caplog.at_level(logging.WARNING, "moda_jax"):
            documents = merged(DataConfig(source=str(tmp_path)))
        lines = {
            f"{name}:{i}".encode(): text for name in (*names, "g.parquet") for i, text in ((1, b"one"), (2, b"two"))
        }
        assert documents == lines | {name.encode(): text for name, text in TEXTS.items()}
        assert not caplog.records

    def test_what_is_passed_over_is_said_by_ending_and_count(self, tmp_path, caplog):
        others = dict.fromkeys(["a.pdf", "b/c.pdf", "d.csv.gz", "Makefile", "e.TSV"], b"x")
        write_texts(tmp_path, TEXTS | others | {"info.json": b'{\n "text": 1\n}', "meta.json": b'{"id": 1}\n'})
        with caplog.at_level(logging.WARNING, "moda_jax"):
            for _ in range(2):
                files = corpus.list_files(DataConfig(source=str(tmp_path)))
        assert [file.name for file in files] == [b"README.txt", b"notes.md"]
        (line,) = (record.getMessage() for record in caplog.records)  # both splits ask, one word is enough
        _, _, parts = line.partition("passed over: ")
        assert sorted(parts.split(", ")) == sorted([
            "2 .pdf", "1 .csv.gz", "1 without ending", "1 .TSV",
            "2 .json without 'text' (data.feature) in its first line; 2 files are read",
        ])  # fmt: skip

    def test_hidden_and_system_names_are_no_documents(self, tmp_path, caplog):
        hidden = ["._a.txt", ".git/x.txt", ".ipynb_checkpoints/a.txt", "__MACOSX/a.txt", "b/.c.txt", "lost+found/a.txt"]
        write_texts(tmp_path / ".corpus", {"a.txt": b"a", "b/d.txt": b"d"} | dict.fromkeys(hidden, b"copy"))
        with caplog.at_level(logging.WARNING, "moda_jax"):
            assert merged(DataConfig(source=str(tmp_path / ".corpus"))) == {b"a.txt": b"a", b"b/d.txt": b"d"}
        assert "passed over: 6 hidden or system names, as " in caplog.text

    def test_the_first_versions_rules_can_still_be_had(self, tmp_path):
        write_texts(tmp_path, TEXTS | {"._a.txt": b"a", "b.jsonl": LINES, "c.JSONL": LINES})
        files = corpus.list_files(DataConfig(source=str(tmp_path)), as_before=True)
        assert [file.name for file in files] == [b"._a.txt", b"README.txt", b"b.jsonl"]

    def test_without_pyarrow_the_error_says_what_to_install(self, tmp_path, monkeypatch):
        write_texts(tmp_path, TEXTS | {"a.parquet": b""})
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        for source in (tmp_path, tmp_path / "a.parquet"):
            with pytest.raises(NotImplementedError, match=r'1 \.parquet files takes pyarrow: .*"moda-jax\[parquet\]"'):
                corpus.list_files(DataConfig(source=str(source)))


def write_parquet(path, texts, **columns):
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.table({"text": texts} | columns), path)


class TestParquet:
    def test_text_passes_unchanged_in_every_form_of_string(self, tmp_path):
        import pyarrow as pa

        texts = ["naïve\n", "", "日本"]
        array = pa.array(texts)
        for i, form in enumerate((array, array.cast(pa.large_string()), array.dictionary_encode())):
            write_parquet(tmp_path / f"{i}.parquet", form, number=[1, 2, 3])
        raw = pa.Array.from_buffers(pa.string(), 1, [None, *pa.array([b"raw \xff"]).buffers()[1:]])
        write_parquet(tmp_path / "3.parquet", raw)
        expected = {f"{i}.parquet:{j}".encode(): text.encode() for i in range(3) for j, text in enumerate(texts, 1)}
        assert merged(DataConfig(source=str(tmp_path))) == expected | {b"3.parquet:1": b"raw \xff"}

    @pytest.mark.parametrize(
        ("texts", "feature", "message"),
        [
            (
                ["a", "b", None],
                "text",
                r"data\.feature='text': .*a\.parquet, row 3 holds nothing there; expected a string",
            ),
            ([1, 2, 3], "text", r"data\.feature='text': .*a\.parquet holds int64 there; expected strings"),
            (["a", "b", "c"], "body", r"data\.feature='body': .*a\.parquet has no such column; it has \['text'\]"),
            (["a", "b" * 11, "c"], "text", r"a\.parquet, row 2 is a document of 11 bytes; expected at most"),
        ],
    )
    def test_rows_that_cannot_be_used(self, tmp_path, texts, feature, message):
        write_parquet(tmp_path / "a.parquet", texts)
        write_texts(tmp_path, {"b.txt": b"b"})
        config = DataConfig(source=str(tmp_path), feature=feature, max_document_bytes=10)
        with pytest.raises(DamageError, match=message):
            read_all(config)
        kept = merged(dataclasses.replace(config, on_damage="skip"))
        assert len(kept) == {"text": 3, "body": 1}[feature] - 2 * (texts[0] == 1)

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
    def test_a_file_cut_off(self, tmp_path, share):
        write_parquet(tmp_path / "a.parquet", [f"text {i}" for i in range(100)])
        os.truncate(tmp_path / "a.parquet", int(share * (tmp_path / "a.parquet").stat().st_size))
        with pytest.raises(
            DamageError, match=r"data\.source=.*a\.parquet cannot be read \(.*; 0 rows before that could"
        ):
            read_all(DataConfig(source=str(tmp_path)))


class TestOneTextFile:
    TEXT = b"".join(b"line %d\n" % i for i in range(100))

    def splits(self, source, **fields):
        splits, _ = read_all(DataConfig(source=str(source), **fields))
        return {split: list(documents.values()) for split, documents in splits.items()}

    @pytest.mark.parametrize("name", ["input.txt", "notes.MD"])
    @pytest.mark.parametrize("as_folder", [False, True])
    def test_its_beginning_is_for_training(self, tmp_path, name, as_folder):
        write_texts(tmp_path, {name: self.TEXT, "other.pdf": b"x"})
        splits = self.splits(tmp_path if as_folder else tmp_path / name, validation_fraction=0.1)
        ((train,), (validation,)) = splits["train"], splits["validation"]
        assert train + validation == self.TEXT
        assert train.endswith(b"\n") and abs(len(validation) - 0.1 * len(self.TEXT)) < 10

    def test_without_lines_it_is_cut_between_characters(self, tmp_path):
        for text in ("日本語" * 100, "日本語" * 100 + "\n"):
            write_texts(tmp_path, {"a.txt": text.encode()})
            splits = self.splits(tmp_path, validation_fraction=0.334)
            assert splits["train"][0].decode() + splits["validation"][0].decode() == text
            assert abs(len(splits["validation"][0]) - 0.334 * len(text.encode())) < 4

    @pytest.mark.parametrize(("fraction", "held"), [(0.25, 25), (1e-6, 1), (1 - 1e-6, 99)])
    def test_a_separator_makes_documents(self, tmp_path, fraction, held):
        stories = [f"story {i:03}\n" for i in range(100)]
        text = "\n<|end|>".join([*stories[:50], " \n", *stories[50:]]) + "\n<|end|>"
        write_texts(tmp_path, {"a.txt": text.encode()})
        fields = {"document_separator": "\n<|end|>", "validation_fraction": fraction}
        splits = self.splits(tmp_path / "a.txt", **fields)
        assert [document.decode() for document in splits["train"] + splits["validation"]] == stories
        assert len(splits["validation"]) == held
        assert self.splits(tmp_path, **fields) == splits

    def test_files_with_a_separator_are_shared_out_by_names(self, tmp_path):
        texts = {f"{i}.txt": b"--".join(b"%d %d" % (i, j) for j in range(9)) for i in range(9)}
        write_texts(tmp_path, texts)
        splits, _ = read_all(DataConfig(source=str(tmp_path), document_separator="--", validation_fraction=0.3))
        names = {f"{i}.txt:{j}".encode(): b"%d %d" % (i, j - 1) for i in range(9) for j in range(1, 10)}
        assert splits["train"] | splits["validation"] == names
        assert set(splits["validation"]) == {name for name in names if hash_as_number(name) < 0.3}

    def test_a_long_document_is_refused_with_what_helps(self, tmp_path):
        write_texts(tmp_path, {"a.txt": self.TEXT})
        with pytest.raises(
            DamageError, match=r"a\.txt holds a document of \d+ bytes; .*; data\.document_separator parts"
        ):
            read_all(DataConfig(source=str(tmp_path), max_document_bytes=100))
        config = DataConfig(source=str(tmp_path), max_document_bytes=10, document_separator="\n")
        assert len(merged(config)) == 100

    def test_a_file_of_one_character_cannot_be_parted(self, tmp_path):
        for text in (b"", b"a", "日".encode()):
            write_texts(tmp_path, {"a.txt": text})
            assert self.splits(tmp_path) == {"train": [text]}

    def test_it_is_said_and_can_be_prepared(self, tmp_path, caplog):
        write_texts(tmp_path, {"input.txt": self.TEXT})
        config = data_config(tmp_path / "input.txt", tmp_path / "cache", validation_fraction=0.1)
        with caplog.at_level(logging.WARNING, "moda_jax"):
            datasets = [open_dataset(config, split, ByteTokenizer()) for split in ("train", "validation")]
        assert b"".join(ByteTokenizer().decode(d.tokens[:-1]).encode() for d in datasets) == self.TEXT
        assert "one text file, split by position: its first 0.9 are for training, the last 0.1 for" in caplog.text
        before = open_dataset(
            dataclasses.replace(config, source=str(tmp_path)), "train", ByteTokenizer(), as_before=True
        )
        assert before.num_tokens == len(self.TEXT) + 1  # the first version's: one document

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"document_separator": ""}, r"data\.document_separator='': expected text that stands between"),
            (
                {"document_separator": "x", "source": "python_stdlib"},
                r"data\.document_separator='x': expected None with",
            ),
            (
                {"document_separator": "x", "source": "tfds:a"},
                r"data\.document_separator='x': expected None with data\.s",
            ),
        ],
    )
    def test_a_separator_that_has_no_use(self, fields, message):
        with pytest.raises(ValueError, match=message):
            DataConfig(**fields)


class TestErrors:
    def check(self, source, message, **fields):
        with pytest.raises(ValueError, match=message):
            read_all(DataConfig(source=str(source), **fields))

    def test_no_such_directory(self, tmp_path):
        self.check(
            tmp_path / "no", rf"data\.source='{tmp_path}/no': no such file or directory; expected 'python_stdlib'"
        )

    def test_a_file_of_another_kind(self, tmp_path):
        write_texts(tmp_path, {"a.pdf": b"a"})
        self.check(tmp_path / "a.pdf", r"data\.source=.*a\.pdf': a file of no known ending; expected .*\.txt, \.md, ")

    def test_no_usable_file(self, tmp_path):
        write_texts(tmp_path, {"a.pdf": b"a", "b.tar.gz": b"", "c.json": b"{}", ".git/d.txt": b"d"})
        self.check(
            tmp_path,
            r"data\.source=.*holds no file that ends in \.txt, \.md, .*; it holds 1 \.pdf, 1 \.tar\.gz, 1 \.json "
            r"without 'text' \(data\.feature\) in its first line, 1 hidden or system names, as .*\.git",
        )

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
            (b"[" * 10**5, r"data\.source=.*a\.jsonl, line 2 is JSON that is nested too deeply"),
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

    @pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
    def test_a_compressed_file_of_no_bytes(self, tmp_path, name):
        write_texts(tmp_path, {"b.txt": b"b"})
        (tmp_path / name).write_bytes(b"")
        self.check(tmp_path, r"data\.source=.*\.gz has no bytes, which no compressed file is; its download was cut off")

    @pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.json", "a.parquet"])
    def test_a_git_lfs_pointer(self, tmp_path, name):
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 12345\n"
        write_texts(tmp_path, {name: pointer, "b.txt": b"b"})
        self.check(tmp_path, rf"data\.source=.*{name} is a Git LFS pointer, not the file itself; .*`git lfs pull`")

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
        write_texts(tmp_path, {"a.txt": b"a" * 11, "b.txt": b"b"})
        message = r"data\.source=.*a\.txt is a document of 11 bytes; expected at most data\.max_document_bytes=10"
        self.check(tmp_path, message, max_document_bytes=10)
