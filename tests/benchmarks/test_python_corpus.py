"""The corpus of installed sources: each text once, whole documents, up to the size asked for."""

import gzip
import json

import pytest

from benchmarks import python_corpus


def test_documents_are_texts_each_once_up_to_the_limit(tmp_path, monkeypatch):
    long = "x = 1\n" * 200
    files = {"a.py": long, "same.py": long, "short.py": "y = 2\n", "b.py": long + "z\n", "late.py": long + "w\n"}
    paths = []
    for name, text in files.items():
        paths.append(tmp_path / name)
        paths[-1].write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" * 300)
    monkeypatch.setattr(python_corpus, "source_files", lambda: [tmp_path / "latin.py", *paths])
    assert list(python_corpus.documents(2000)) == [long, long + "z\n"]
    monkeypatch.setattr(python_corpus, "PART_BYTES", 1500)
    assert python_corpus.write(tmp_path / "out", 10**6) == (3, 3 * len(long) + 4)
    parts = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in parts] == ["part-000.jsonl.gz", "part-001.jsonl.gz"]
    lines = [line for path in parts for line in gzip.decompress(path.read_bytes()).splitlines()]
    texts = [json.loads(line)["text"] for line in lines]
    assert texts == [long, long + "z\n", long + "w\n"]


@pytest.mark.slow
def test_installed_sources_come_in_one_order():
    files = python_corpus.source_files()
    assert len(files) > 1000
    assert files == python_corpus.source_files()
