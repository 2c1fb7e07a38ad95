import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.saved_run import loaded_run, log_probs, save_run, tiny_run_config
from support.tiny_tokenizer import write_bpe

import moda_jax
from moda_jax.inference.generation import generate
from moda_jax.inference.language_model import LanguageModel, cache_of
from moda_jax.inference.sampling import SamplingConfig
from moda_jax.interop import export_model

TEXT = "import os"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    return workdir, save_run(workdir, tiny_run_config(), steps=(5, 10))


@pytest.fixture
def model():
    return LanguageModel(loaded_run(tiny_run_config()))


def test_a_run_is_loaded(saved):
    model = moda_jax.load(saved[0])
    assert isinstance(model, moda_jax.LanguageModel) and isinstance(model.model, moda_jax.Transformer)
    assert (model.step, moda_jax.load(saved[0], step=5).step, model.is_export) == (10, 5, False)
    assert model.config.model == model.model.config
    assert model.tokenizer.decode(model.tokenizer.encode(TEXT)) == TEXT
    np.testing.assert_array_equal(model.model.embedding.table[...], saved[1]["embedding"]["table"])


def test_an_export_of_a_run_is_the_same_model(saved, tmp_path):
    run = moda_jax.load(saved[0])
    export_model(run.config.model, saved[1], tmp_path / "out", end_of_text_id=run.tokenizer.end_of_text_id)
    export = moda_jax.load(tmp_path / "out")
    assert (export.is_export, export.step, export.config.data.tokenizer) == (True, 0, "bytes")
    assert export.config.data.sequence_length == 64  # as long as the model reads
    tokens = jnp.asarray(export.tokenizer.encode(TEXT))[None]
    np.testing.assert_array_equal(export.model(tokens), run.model(tokens))
    with pytest.raises(ValueError, match=r"^step=3: .* holds an exported model, which has no steps"):
        moda_jax.load(tmp_path / "out", step=3)
    with pytest.raises(ValueError, match=r"^ema=True: .* holds an exported model, which has one set of weights"):
        moda_jax.load(tmp_path / "out", ema=True)
    assert cache_of(tmp_path / "out") == cache_of(saved[0])


def test_the_averaged_weights_are_loaded(tmp_path):
    params = save_run(tmp_path, tiny_run_config(optimizer={"warmup_steps": 2, "ema_decay": 0.9}))
    model = moda_jax.load(tmp_path, ema=True)
    np.testing.assert_array_equal(model.model.embedding.table[...], 2.0 * params["embedding"]["table"])


def test_an_export_takes_the_tokenizer_that_lies_in_it_or_asks_for_one(saved, tmp_path):
    config = moda_jax.TransformerConfig(
        vocab_size=300, num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_dim=8, ffn_width=16,
        max_sequence_length=32,
    )  # fmt: skip
    params = nnx.to_pure_dict(nnx.state(moda_jax.Transformer(config, rngs=nnx.Rngs(0)), nnx.Param))
    export_model(config, params, tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json, and 300 tokens are not bytes; name one"):
        moda_jax.load(tmp_path / "out")
    other = write_bpe(tmp_path / "other.json")
    assert moda_jax.load(tmp_path / "out", tokenizer=other).config.data.tokenizer == str(other)
    write_bpe(tmp_path / "out" / "tokenizer.json")
    assert moda_jax.load(tmp_path / "out").config.data.tokenizer == str(tmp_path / "out" / "tokenizer.json")


def test_what_is_neither_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        moda_jax.load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        moda_jax.load(tmp_path)


def test_generate_is_the_batch_of_its_prompts(model):
    run, pieces = model.run, {0: "", 1: ""}

    def add(row, text):
        pieces[row] += text

    first, second = model.generate("import", "def", max_tokens=9, temperature=1.0, top_k=50, seed=3, on_text=add)
    expected = generate(
        run.model, run.params, run.tokenizer, ["import", "def"], max_tokens=9,
        sampling=SamplingConfig(1.0, 50), key=jax.random.key(3),
    )  # fmt: skip
    assert [first, second] == expected
    assert pieces == {0: first.text, 1: second.text}


def test_one_stop_string_is_one_string(model):
    (whole,) = model.generate(TEXT, max_tokens=16, temperature=0)
    expected = model.generate(TEXT, max_tokens=16, temperature=0, stop=(whole.text[1:3],))
    assert model.generate(TEXT, max_tokens=16, temperature=0, stop=whole.text[1:3]) == expected
    assert expected[0].reason == "stop"


def test_the_loss_is_the_mean_over_all_texts_tokens(model):
    nats = []
    for text in ("import os", "def"):
        tokens = np.append(model.tokenizer.encode(text), model.tokenizer.end_of_text_id)
        nats += [-log_probs(model.run, tokens)[i, tokens[i + 1]] for i in range(len(tokens) - 1)]
    result = model.evaluate("import os", b"def")
    assert (result.tokens, result.documents, result.bytes) == (len(nats), 2, 12)
    assert result.loss == pytest.approx(np.mean(nats), rel=1e-6) == model.loss("import os", "def")
    assert result.bits_per_byte == pytest.approx(sum(nats) / 12 / math.log(2), rel=1e-6)


def test_mistakes_name_the_argument(model):
    with pytest.raises(ValueError, match=r"^texts: got 2, 1 of them empty; expected some text"):
        model.loss("a", "")
    with pytest.raises(ValueError, match=r"^texts: got 0, 0 of them empty"):
        model.loss()
    with pytest.raises(ValueError, match=r"^context=65: expected 1\.\.64"):
        model.loss("a", context=65)
    with pytest.raises(ValueError, match=r"^temperature=-1: expected 0"):
        model.generate("a", temperature=-1)
    with pytest.raises(ValueError, match=r"^prompt: none given"):
        model.generate()
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.run = None
