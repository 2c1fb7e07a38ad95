import gzip
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from support.saved_run import loaded_run, log_probs, tiny_run_config
from support.tiny_tokenizer import words_without_unknown, write_bpe, write_letters

from moda_jax.data.tokenizer import HuggingFaceTokenizer
from moda_jax.inference import perplexity
from moda_jax.inference.perplexity import (
    Domain,
    checked_windows,
    domain_windows,
    evaluate_domains,
    format_table,
    read_domain,
)


@pytest.fixture(scope="module")
def run():
    return loaded_run(tiny_run_config())


def test_what_the_tokenizer_loses_of_a_domain_is_said(tmp_path, caplog):
    run = SimpleNamespace(tokenizer=HuggingFaceTokenizer(write_letters(tmp_path / "letters.json")))
    with caplog.at_level("WARNING", "moda_jax"):
        (tokens,) = perplexity._encode(run, Domain("own", [b"a b, c"]))
    assert tokens.tolist() == [1, 2, 3]
    lost = "1 characters stand in no token; 2 white-space characters stand in no token"
    assert f"--data=own=...: the tokenizer lost text: {lost}" in caplog.text
    run.tokenizer = words_without_unknown(tmp_path / "words.json")
    with pytest.raises(ValueError, match=r"--data=own=\.\.\.: data\.tokenizer=.*: cannot encode a text"):
        perplexity._encode(run, Domain("own", [b"other words"]))


@pytest.mark.parametrize(
    ("length", "context", "stride"), [(1, 8, 4), (2, 8, 4), (9, 8, 4), (10, 8, 4), (40, 8, 4), (41, 8, 8), (23, 8, 1)]
)
def test_every_token_but_the_first_is_predicted_once_with_enough_context(length, context, stride):
    tokens, predicted = np.arange(length), []
    for i, (window, scored) in enumerate(domain_windows(tokens, context, stride)):
        assert len(window) - 1 <= context and scored <= (context if i == 0 else stride)
        first = len(window) - scored
        assert i == 0 or first >= context - stride + 1
        np.testing.assert_array_equal(window, np.arange(window[0], window[0] + len(window)))
        predicted += window[first:].tolist()
    assert predicted == list(range(1, length))


def nats(run, text, context, stride):
    """Summed -log p of a document by one forward pass per predicted token."""
    tokens = np.concatenate([run.tokenizer.encode(text), [run.tokenizer.end_of_text_id]])
    total = 0.0
    for place in range(1, len(tokens)):
        window = 0 if place <= context else -(-(place - context) // stride)  # which window predicts it
        end = min(len(tokens), 1 + context + window * stride)
        begin = max(0, end - 1 - context)
        total -= log_probs(run, tokens[begin:place])[-1, tokens[place]]
    return total, len(tokens) - 1


def test_loss_perplexity_and_bits_are_those_of_single_predictions(run):
    documents = {"a": [b"def f(x): return x", b"ab"], "b": [b"\xff\xfe no text in UTF-8"]}
    domains = [Domain(name, texts) for name, texts in documents.items()]
    seen = []
    results = evaluate_domains(run, domains, context=16, stride=5, progress=lambda *state: seen.append(state))
    for result, texts in zip(results, documents.values(), strict=True):
        sums, counts = zip(*(nats(run, text, 16, 5) for text in texts), strict=True)
        size = sum(map(len, texts))
        assert (result.documents, result.tokens, result.bytes) == (len(texts), sum(counts), size)
        assert result.loss == pytest.approx(sum(sums) / sum(counts), abs=1e-5)  # weighted by tokens, not by documents
        assert result.perplexity == pytest.approx(math.exp(result.loss))
        assert result.bits_per_byte == pytest.approx(sum(sums) / math.log(2) / size, abs=1e-5)
    assert seen[-1] == (39, 39)
    lines = format_table(results).splitlines()
    assert lines[0].split() == ["domain", "documents", "tokens", "loss", "perplexity", "bits/byte"]
    assert lines[1].split()[:4] == ["a", "2", "20", f"{results[0].loss:.4f}"]


def test_bits_per_byte_count_bytes_and_not_tokens(tmp_path):
    path = write_bpe(tmp_path / "t.json", 300)
    run = loaded_run(tiny_run_config(model={"vocab_size": 300}, data={"tokenizer": str(path)}))
    text = "class import 日本語".encode()
    (result,) = evaluate_domains(run, [Domain("x", [text])])
    assert result.tokens < result.bytes == len(text)
    assert result.bits_per_byte == pytest.approx(result.loss * result.tokens / math.log(2) / len(text))


def test_domains_are_read_from_files_and_directories(tmp_path):
    (tmp_path / "a.md").write_text("one")
    lines = "".join(json.dumps({"text": text, "body": text * 2}) + "\n" for text in ("x", " ", "y"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "sub" / "c.txt").write_text("z")
    assert read_domain(f"one={tmp_path / 'a.md'}") == Domain("one", [b"one"])
    assert read_domain(f"l={tmp_path / 'sub' / 'b.jsonl.gz'}", "body").documents == [b"xx", b"yy"]
    assert read_domain(f"d={tmp_path / 'sub'}").documents == [b"x", b"y", b"z"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("wiki.txt", r"--data=wiki\.txt: expected NAME=PATH"),
        ("=a", r"--data==a: expected NAME=PATH"),
        ("a=none.txt", r"--data=a=none\.txt: no such file or directory; expected NAME=PATH of a text file"),
        ("a=empty.txt", r"--data=a=empty\.txt: holds no text; name a file with some"),
        ("a=empty", r"--data=a=empty: empty holds no file that ends in \.txt"),
        ("a=bad.jsonl", r"--data=a=bad\.jsonl: .*bad\.jsonl.* line 1"),
    ],
)
def test_a_domain_that_cannot_be_read_says_why(tmp_path, monkeypatch, argument, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=message):
        read_domain(argument)


def test_context_and_stride_are_checked(run):
    assert checked_windows(run, None, None) == (32, 16)
    with pytest.raises(ValueError, match=r"context=65: expected 1\.\.64, the model's context"):
        checked_windows(run, 65, None)
    with pytest.raises(ValueError, match=r"stride=33: expected 1\.\.32, the context"):
        checked_windows(run, None, 33)
