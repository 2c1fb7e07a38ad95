import dataclasses
import json
import lzma

import numpy as np
import pytest

from experiments import corpus
from moda_jax.config import DataConfig
from moda_jax.data.pipeline import open_dataset
from moda_jax.data.tokenizer import load_tokenizer

WORDS = ("one two three four five", "def f(x): return x", "import os, sys", "the quick brown fox")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    (root / "text" / "train").mkdir(parents=True)
    (root / "text" / "held_out").mkdir()
    lines = [json.dumps({"source": f"s{i % 3}", "text": f"{WORDS[i % 4]} {i}"}) + "\n" for i in range(200)]
    with lzma.open(root / "text" / "train" / "a.jsonl.xz", "wt") as file:
        file.writelines(lines)
    (root / "text" / "held_out" / "b.jsonl").write_text(json.dumps({"text": "another " * 20}) + "\n")
    return root, corpus.prepare(root / "text", root / "prepared", vocab_size=300), lines


def config(directory):
    source, tokenizer = f"tokens:{directory / 'tokens'}", str(directory / "tokenizer.json")
    return DataConfig(source=source, tokenizer=tokenizer, sequence_length=16)


def test_tokens_and_sets_hold_every_document_once(prepared):
    _, directory, lines = prepared
    facts = corpus.facts(directory)
    counts = {split: entry["documents"] for split, entry in facts["tokens"].items()}
    assert sum(counts.values()) == len(lines) and 3 < counts["validation"] < 25
    by_source = {name: entry["documents"] for name, entry in facts["evaluation"].items() if name != "held_out"}
    assert set(by_source) <= {"validation/s0", "validation/s1", "validation/s2"}
    assert sum(by_source.values()) == counts["validation"]
    assert facts["evaluation"]["held_out"]["documents"] == 1
    tokenizer = load_tokenizer(config(directory))
    train = open_dataset(config(directory), "train", tokenizer)
    assert (train.num_documents, train.num_tokens) == (counts["train"], facts["tokens"]["train"]["tokens"])
    first = train.tokens[: train.offsets[1] - 1]
    assert tokenizer.decode(first) in {json.loads(line)["text"] for line in lines}


def test_the_split_is_the_projects_own(prepared):
    """A document's name is the line's in the unpacked file, so text and tokens are split alike."""
    root, directory, lines = prepared
    (root / "plain").mkdir()
    (root / "plain" / "a.jsonl").write_text("".join(lines))
    plain = dataclasses.replace(config(directory), source=str(root / "plain"), cache_dir=str(root / "cache"))
    tokenizer = load_tokenizer(plain)
    for split in ("train", "validation"):
        texts = []
        for data in (open_dataset(plain, split, tokenizer), open_dataset(config(directory), split, tokenizer)):
            bounds = zip(data.offsets, data.offsets[1:], strict=False)
            texts.append(sorted(tokenizer.decode(data.tokens[begin : end - 1]) for begin, end in bounds))
        assert texts[0] == texts[1]


def test_it_travels_as_one_file(prepared, tmp_path):
    _, directory, _ = prepared
    archive = tmp_path / "corpus.tar.xz"
    corpus.pack(directory, archive)
    unpacked = corpus.unpack(archive, tmp_path / "there" / "corpus")
    assert corpus.facts(unpacked) == corpus.facts(directory)
    tokenizer = load_tokenizer(config(unpacked))
    here, there = (open_dataset(config(place), "train", tokenizer) for place in (directory, unpacked))
    assert here.fingerprint == there.fingerprint
    np.testing.assert_array_equal(here.tokens, there.tokens)
    archive.unlink()
    assert corpus.unpack(archive, unpacked) == unpacked  # it is there: the archive is not asked


def test_what_is_no_archive_and_no_corpus(prepared, tmp_path):
    (tmp_path / "bad.tar.xz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"--data=.*bad.tar.xz: cannot be unpacked"):
        corpus.unpack(tmp_path / "bad.tar.xz", tmp_path / "corpus")
    with pytest.raises(ValueError, match=r"--corpus: .*train holds no file that ends in .jsonl, .jsonl.xz"):
        corpus.prepare(tmp_path, tmp_path / "prepared")


def test_tokens_of_another_tokenizer_are_refused(prepared, tmp_path):
    _, directory, _ = prepared
    with pytest.raises(ValueError, match=r"data.tokenizer: is not the tokenizer that made the tokens in"):
        open_dataset(config(directory), "train", load_tokenizer(DataConfig()))
    missing = DataConfig(source=f"tokens:{tmp_path}")
    with pytest.raises(ValueError, match=r"data.source: .*train holds no prepared tokens"):
        open_dataset(missing, "train", load_tokenizer(missing))
