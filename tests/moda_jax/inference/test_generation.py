import io

import jax
import pytest
from support.saved_run import random_model, tiny_run_config
from support.tiny_tokenizer import write_bpe, write_letters

from moda_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from moda_jax.inference.decode import inference_params
from moda_jax.inference.generation import OrderedText, TextStream, encode_prompts, generate, padded_length
from moda_jax.inference.sampling import GREEDY, SamplingConfig

TEXT = "naïve 日本語 🙂🙃 end"
CONFIG = tiny_run_config().model
RANDOM = SamplingConfig(1.0, top_p=0.95)  # one for all tests: each is compiled


@pytest.fixture(scope="module")
def model():
    function, params = random_model(CONFIG)
    return function, inference_params(params, CONFIG)


def run(model, prompts, **options):
    function, params = model
    return generate(function, params, ByteTokenizer(), prompts, **({"max_tokens": 20} | options))


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, tmp_path):
    return ByteTokenizer() if request.param == "bytes" else HuggingFaceTokenizer(write_bpe(tmp_path / "t.json"))


def test_a_stream_never_shows_half_a_character(tokenizer):
    ids = tokenizer.encode(TEXT)
    stream, pieces = TextStream(tokenizer), []
    for token in ids:
        pieces.append(stream.push([token]))
        assert TEXT.startswith("".join(pieces))  # nothing is shown that later changes
    assert "".join(pieces) + stream.finish() == TEXT
    assert len([piece for piece in pieces if piece]) > 10


def test_bytes_that_are_no_text_are_shown_in_the_end():
    ids = [65, 0xFF, 66, 0xF0, 0x9F]
    stream = TextStream(ByteTokenizer())
    came = "".join(stream.push([token]) for token in ids)
    assert came == "A\ufffdB"
    assert came + stream.finish() == ByteTokenizer().decode(ids)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["日本"], "naïve "),
        (["end", "🙂🙃"], "naïve 日本語 "),
        (["ve", "naï"], ""),
        (["never"], TEXT),
        (["endless"], TEXT),
    ],
)
def test_a_stop_string_ends_the_text_wherever_the_chunks_are(tokenizer, stop, expected, chunk):
    ids = tokenizer.encode(TEXT)
    stream, came = TextStream(tokenizer, stop=stop), ""
    for i in range(0, len(ids), chunk):
        came += stream.push(ids[i : i + chunk])
        assert expected.startswith(came)
    assert came + stream.finish() == expected
    assert stream.stopped == (expected != TEXT)


def test_a_prompt_is_not_repeated(tokenizer):
    prompt, rest = tokenizer.encode("naïve 日"), tokenizer.encode("本語")
    stream = TextStream(tokenizer, prompt)
    assert stream.push(rest) + stream.finish() == "本語"


def test_each_row_may_have_its_own_limit(model):
    prompts = ["import os", "a", "def f(self):"]
    whole = run(model, prompts, sampling=RANDOM)
    cut = run(model, prompts, sampling=RANDOM, max_tokens=[20, 3, 7])  # the largest is that of the others: one program
    assert [completion.num_tokens for completion in cut] == [
        min(limit, completion.num_tokens) for limit, completion in zip([20, 3, 7], whole, strict=True)
    ]
    assert all(long.text.startswith(short.text.rstrip("\ufffd")) for long, short in zip(whole, cut, strict=True))
    with pytest.raises(ValueError, match=r"max_tokens: 2 numbers for 3 prompts, expected one per prompt"):
        run(model, prompts, max_tokens=[1, 2])


def test_every_row_is_continued_as_alone_and_streamed_whole(model):
    prompts = ["import os", "a", "def f(self):"]
    pieces, ended = {0: "", 1: "", 2: ""}, []

    def on_text(row, text):
        pieces[row] += text

    together = run(model, prompts, sampling=RANDOM, on_text=on_text, on_end=ended.append)
    assert [pieces[i] for i in range(3)] == [completion.text for completion in together]
    assert {completion.reason for completion in together} <= {"length", "end_of_text"}
    assert sorted(ended) == [0, 1, 2]
    for row in (0, 1):
        assert together[row] == run(model, [prompts[row]], sampling=RANDOM)[0]
    assert run(model, prompts, sampling=RANDOM, key=jax.random.key(1)) != together


def test_a_stop_string_and_the_length_end_a_completion(model):
    (whole,) = run(model, ["import os"], sampling=RANDOM)
    assert (whole.num_tokens, whole.reason) == (20, "length")
    stop = whole.text[7:9]
    (stopped,) = run(model, ["import os"], sampling=RANDOM, stop=[stop])
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.reason == "stop"
    (shorter,) = run(model, ["import os"], sampling=RANDOM, max_tokens=18)
    assert shorter.num_tokens == 18 and whole.text.startswith(shorter.text.rstrip("\ufffd"))


@pytest.mark.slow
def test_the_whole_context_can_be_used(model):
    (completion,) = run(model, ["x" * 40], max_tokens=CONFIG.max_sequence_length - 40, sampling=GREEDY)
    assert completion.num_tokens == 24


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompt: none given"),
        ([""], {}, "prompt='': gives no tokens"),
        (["x" * 64], {}, r"prompt='x{37}\.\.\.': has 64 tokens, but the model's context is 64 .* shorten it"),
        (["x" * 50], {}, r"max_tokens=20: expected at most 14, because prompt='x{37}\.\.\.' has 50 tokens"),
        (["a\udcff"], {}, r"prompt='a\\udcff': expected UTF-8; character 1 is none"),
        (["x"], {"stop": ["\udcff"]}, r"stop='\\udcff': expected UTF-8; character 0 is none"),
        (["x"], {"max_tokens": 0}, "max_tokens=0: expected at least 1"),
        (["x"], {"stop": [""]}, "stop='': expected a string of at least one character"),
    ],
)
def test_mistakes_are_named(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        run(model, prompts, **options)


def test_what_the_tokenizer_loses_of_a_prompt_is_said(tmp_path, caplog):
    tokenizer = HuggingFaceTokenizer(write_letters(tmp_path / "letters.json"))
    with caplog.at_level("WARNING", "moda_jax"):
        (ids,) = encode_prompts(tokenizer, ["a!b"], [1], 64)
    assert ids.tolist() == [1, 2]
    assert "prompt='a!b': the tokenizer lost text: 1 characters stand in no token" in caplog.text


def test_padded_lengths_are_few_and_never_too_short():
    lengths = [padded_length(n, 4096) for n in range(1, 4097)]
    assert all(n <= padded <= max(n * 1.25, n + 15) for n, padded in enumerate(lengths, 1))
    assert len(set(lengths)) < 35 and lengths[-1] == 4096
    assert padded_length(63, 63) == 63


def test_rows_are_written_in_order_each_as_early_as_possible():
    stream = io.StringIO()
    text = OrderedText(["a", "b"], stream)
    text.add(1, "1")
    assert stream.getvalue() == "a"  # the first prompt, and nothing of the second row
    text.add(0, "0")
    assert stream.getvalue() == "a0"
    text.end(1)
    text.end(0)
    assert stream.getvalue() == "a0\n---\nb1\n"
