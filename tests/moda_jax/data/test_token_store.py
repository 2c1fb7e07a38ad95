"""The tokenised form: layout, dtypes, end-of-text, empty documents, fingerprints."""

import json
import logging

import numpy as np
import pytest
from support.tiny_tokenizer import words_without_unknown

from moda_jax.config import DataConfig
from moda_jax.data import token_store
from moda_jax.data.damage import DamageError, SkippedDocuments
from moda_jax.data.file_array import FileArray
from moda_jax.data.token_store import prepare_tokens
from moda_jax.data.tokenizer import ByteTokenizer
from moda_jax.data.tokenizer_file import Losses


class Documents(list):
    holds_tokens = False

    def name_of(self, index):
        return f"document {index}"


class TokenDocuments(Documents):
    holds_tokens = True


class WideTokenizer(ByteTokenizer):
    """Bytes, shifted so far that 16 bits are too few."""

    vocab_size = 70000
    end_of_text_id = 69999
    fingerprint = "wide"

    def encode_batch(self, documents):
        return [np.frombuffer(document, np.uint8).astype(np.int32) + 69000 for document in documents], Losses()


class StrictTokenizer(ByteTokenizer):
    """Would change what is not UTF-8."""

    needs_utf8 = True


def no_documents():
    raise AssertionError("asked for the documents")


def test_layout(tmp_path):
    dataset = prepare_tokens(tmp_path / "t", lambda: Documents([b"ab", b"", b"c"]), ByteTokenizer(), "texts")
    assert dataset.tokens.tolist() == [97, 98, 256, 99, 256]
    assert dataset.offsets.tolist() == [0, 3, 5]
    assert (dataset.num_tokens, dataset.num_documents, dataset.name) == (5, 2, "texts")
    assert dataset.tokens.dtype == np.uint16 and dataset.offsets.dtype == np.int64
    assert isinstance(dataset.tokens, FileArray) and isinstance(dataset.offsets, FileArray)
    with pytest.raises(TypeError, match="item assignment"):
        dataset.tokens[0] = 1
    assert [dataset.num_rows(T) for T in (1, 2, 4, 5)] == [4, 2, 1, 0]


def test_wide_vocabulary(tmp_path):
    dataset = prepare_tokens(tmp_path / "t", lambda: Documents([b"a"]), WideTokenizer(), "texts")
    assert dataset.tokens.dtype == np.uint32 and dataset.tokens.tolist() == [69097, 69999]


def test_tokens_with_and_without_their_own_end_of_text(tmp_path):
    documents = TokenDocuments([np.array([1, 256]), np.array([256, 2], np.uint64), np.array([256])])
    dataset = prepare_tokens(tmp_path / "t", lambda: documents, ByteTokenizer(), "tokens")
    assert dataset.tokens.tolist() == [1, 256, 256, 2, 256, 256]
    assert dataset.offsets.tolist() == [0, 2, 5, 6]


@pytest.mark.parametrize("ids", [[-1, 3], [3, 257], [2**40]])
def test_token_ids_outside_of_the_vocabulary(tmp_path, ids):
    with pytest.raises(ValueError, match=r"data\.feature: tokens holds token ids .*; data\.tokenizer has 0\.\.256"):
        prepare_tokens(tmp_path / "t", lambda: TokenDocuments([np.array(ids)]), ByteTokenizer(), "tokens")
    assert not (tmp_path / "t").exists()


def test_a_document_without_tokens_is_refused_or_left_out_by_name(tmp_path):
    tokenizer = words_without_unknown(tmp_path / "words.json")
    documents = Documents([b"good text", b"bad text", b"text good"])
    message = r"texts, document document 1: data\.tokenizer='.*words\.json': cannot encode a text \(.*needs an unknown"
    with pytest.raises(DamageError, match=message):
        prepare_tokens(tmp_path / "t", lambda: documents, tokenizer, "texts")
    skipped = SkippedDocuments(DataConfig(on_damage="skip"))
    dataset = prepare_tokens(tmp_path / "t", lambda: documents, tokenizer, "texts", skipped)
    assert dataset.tokens.tolist() == [1, 2, 0, 2, 1, 0]
    assert list(skipped.reasons) == ["document 1"] and "cannot encode" in skipped.reasons["document 1"]


def test_what_the_tokenizer_loses_is_counted_and_said(tmp_path, caplog):
    tokenizer = words_without_unknown(tmp_path / "words.json")
    for _ in range(2):  # when the tokens are made, and whenever they are opened
        with caplog.at_level(logging.WARNING, "moda_jax"):
            prepare_tokens(tmp_path / "t", lambda: Documents([b"good text ", b"text"]), tokenizer, "texts")
        assert "texts: the tokenizer lost text: 2 white-space characters stand in no token (of 5 tokens)" in caplog.text
        caplog.clear()
    with caplog.at_level(logging.WARNING, "moda_jax"):
        prepare_tokens(tmp_path / "bytes", lambda: Documents([b"good text "]), ByteTokenizer(), "texts")
    assert not caplog.records


def test_chunks_do_not_show(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    documents = Documents(rng.integers(0, 256, rng.integers(0, 50)).astype(np.uint8).tobytes() for _ in range(100))
    whole = prepare_tokens(tmp_path / "whole", lambda: documents, ByteTokenizer(), "texts")
    monkeypatch.setattr(token_store, "_CHUNK_DOCUMENTS", 7)
    monkeypatch.setattr(token_store, "_CHUNK_BYTES", 60)
    chunked = prepare_tokens(tmp_path / "chunked", lambda: documents, ByteTokenizer(), "texts")
    assert whole.fingerprint == chunked.fingerprint
    np.testing.assert_array_equal(whole.tokens, chunked.tokens)
    expected = [token for document in documents if document for token in (*document, 256)]
    assert whole.tokens.tolist() == expected


def test_made_once(tmp_path):
    first = prepare_tokens(tmp_path / "t", lambda: Documents([b"ab"]), ByteTokenizer(), "texts")
    again = prepare_tokens(tmp_path / "t", no_documents, ByteTokenizer(), "texts")
    assert again.fingerprint == first.fingerprint and again.tokens.tolist() == first.tokens.tolist()


def test_fingerprint(tmp_path):
    def fingerprint(place, documents, tokenizer):
        return prepare_tokens(tmp_path / place, lambda: Documents(documents), tokenizer, place).fingerprint

    base = fingerprint("a", [b"ab", b"c"], ByteTokenizer())
    assert fingerprint("b", [b"ab", b"", b"c"], ByteTokenizer()) == base
    different = [
        fingerprint("c", [b"c", b"ab"], ByteTokenizer()),
        fingerprint("d", [b"ab", b"d"], ByteTokenizer()),
        fingerprint("e", [b"abc"], ByteTokenizer()),
        fingerprint("f", [b"ab", b"c"], WideTokenizer()),
    ]
    assert len({base, *different}) == 5


def test_what_was_skipped_is_counted_and_named(tmp_path, caplog):
    documents = Documents([b"", b"a\xff", b"", b"b"])
    for _ in range(2):  # when it is made, and when it is found
        caplog.clear()
        with caplog.at_level(logging.INFO, "moda_jax"):
            dataset = prepare_tokens(tmp_path / "t", lambda: documents, StrictTokenizer(), "texts")
        assert dataset.tokens.tolist() == [98, 256]
        assert "texts: 2 empty documents skipped" in caplog.text
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert warning.startswith(
            f"texts: 1 DOCUMENTS LEFT OUT (all named in {tmp_path}/t/skipped.jsonl): document 1: "
        )
        assert warning.endswith("document document 1: not valid UTF-8 (invalid start byte at byte 1)")
    assert json.loads((tmp_path / "t" / "meta.json").read_text())["num_skipped_documents"] == 3
    names = [json.loads(line)["name"] for line in (tmp_path / "t" / "skipped.jsonl").read_text().splitlines()]
    assert names == ["document 0", "document 1", "document 2"]


def test_invalid_utf8_is_refused_where_the_config_says_so(tmp_path):
    skipped = SkippedDocuments(DataConfig(on_invalid_utf8="fail"))
    with pytest.raises(DamageError, match=r"data\.on_invalid_utf8='fail': texts, document document 1: not valid UTF-8"):
        prepare_tokens(tmp_path / "t", lambda: Documents([b"a", b"\xff"]), StrictTokenizer(), "texts", skipped)
    assert not (tmp_path / "t").exists()
    dataset = prepare_tokens(tmp_path / "t", lambda: Documents([b"a", b"\xff"]), ByteTokenizer(), "texts", skipped)
    assert dataset.tokens.tolist() == [97, 256, 255, 256]  # bytes pass unchanged, so nothing is wrong


def test_no_token_at_all(tmp_path):
    dataset = prepare_tokens(tmp_path / "t", lambda: Documents([b""]), ByteTokenizer(), "texts")
    assert (dataset.num_tokens, dataset.num_documents, dataset.num_rows(1)) == (0, 0, 0)


def test_arrays_that_are_not_what_was_written(tmp_path):
    prepare_tokens(tmp_path / "t", lambda: Documents([b"ab"]), ByteTokenizer(), "texts")
    np.save(tmp_path / "t" / "tokens.npy", np.zeros(2, np.uint16))
    with pytest.raises(ValueError, match=rf"{tmp_path}/t: the arrays do not have the lengths in meta\.json"):
        prepare_tokens(tmp_path / "t", no_documents, ByteTokenizer(), "texts")
