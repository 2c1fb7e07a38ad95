"""Language modelling as a task, and its data."""

import logging
import math

import jax
import numpy as np
import pytest
from support.tiny_run import tiny_config, write_corpus

from moda_jax import param_count
from moda_jax.parallel.batches import RowShare
from moda_jax.tasks.language import LanguageModelling, perplexity
from moda_jax.tasks.registry import find_task, make_task


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("language")
    write_corpus(root / "corpus")
    return root


@pytest.fixture(scope="module")
def make(place):
    """The task of a one-layer model; keyword arguments change the config's sections."""

    def make_(source="corpus", **sections):
        sections["model"] = {"num_layers": 1, "depth": "none"} | sections.get("model", {})
        return make_task(tiny_config(place / source, place / "cache", **sections))

    return make_


def opened(task):
    return task.open_data(RowShare(0, 1))


@pytest.fixture(scope="module")
def data(make):
    return opened(make())


def test_a_task_is_found_by_its_name_and_by_its_path():
    assert find_task("language") is LanguageModelling
    assert find_task("moda_jax.tasks.language:LanguageModelling") is LanguageModelling


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("moda_jax.tasks.nothing:Task", r"train\.task='moda_jax\.tasks\.nothing:Task': cannot be imported \(No module"),
        ("moda_jax.tasks.language:Batch", r"train\.task=.*: expected a subclass of Task, got <class .*Batch'>"),
    ],
)
def test_a_name_that_is_no_tasks_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        find_task(name)


def test_a_word_that_is_no_tasks_is_refused_by_the_config(make):
    with pytest.raises(ValueError, match=r"train\.task='vison': expected one of \('language',"):
        make(train={"task": "vison"})


def test_what_people_read_of_its_metrics(make):
    task = make()
    assert task.describe(task.values({"loss": 0.5})) == "loss 0.5000 nats per byte, perplexity 1.649"
    assert task.metrics[0].label == "loss (nats per byte)"


def test_perplexity():
    assert perplexity(2.0) == pytest.approx(math.e**2)
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_its_description(make, data, place):
    task = make()
    lines = dict(task.description())
    assert list(lines) == ["model", "attention"]
    assert f"({param_count(task.config.model)}), 1 layers, depth=none" in lines["model"]
    assert data.description().startswith(f"{place / 'corpus'}: ")


def test_parameters_from_elsewhere_get_their_padding(make):
    task = make()
    params = jax.eval_shape(task.initial_params, jax.random.key(0))
    bare = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), task.older_shapes(params))
    assert bare["embedding"]["table"].shape[0] == 257
    table = np.asarray(task.adapted(bare)["embedding"]["table"])
    assert table.shape == params["embedding"]["table"].shape == (384, bare["embedding"]["table"].shape[1])
    assert table[:257].all() and not table[257:].any()
    with pytest.raises(ValueError, match="params: names or shapes differ from those of the config's model"):
        task.adapted(bare | {"head": np.zeros(3)})


def test_batches_go_on_at_a_position(data):
    with data.train_batches(0) as batches:
        first, second = next(batches), next(batches)
        position = batches.position
    assert first.tokens.shape == (4, 32) and position == 8
    with data.train_batches(4) as batches:
        jax.tree.map(np.testing.assert_array_equal, next(batches), second)


def test_batches_are_laid_out_as_the_task_says(make, data):
    with data.train_batches(0) as batches:
        batch = next(batches)
    assert jax.tree.map(lambda a: (a.shape, a.dtype.name), batch) == jax.tree.map(
        lambda layout: (layout.shape, layout.dtype), make().layout
    )


def test_validation_batches_are_as_many_as_the_config_says(data):
    assert [batch.tokens.shape for batch in data.validation_batches()] == [(4, 32)] * 2


def test_without_evaluation_there_is_no_validation_data(make):
    assert opened(make(eval={"interval_steps": 0})).validation_fingerprint is None


def test_fingerprints_are_those_of_the_data(data, make, place):
    write_corpus(place / "other", seed=1)
    ours, same, others = (
        d.fingerprints() for d in (data, opened(make(train={"seed": 1})), opened(make("other")))
    )  # fmt: skip
    assert same == ours
    assert others["dataset_fingerprint"] != ours["dataset_fingerprint"]
    assert others["tokenizer_fingerprint"] == ours["tokenizer_fingerprint"]


def test_a_mixture_is_data_of_its_own(data, make, place):
    write_corpus(place / "mixed", seed=2)
    source = f"3*{place / 'corpus'} + 1*{place / 'mixed'}"
    mixed = opened(make(data={"source": source}))
    assert mixed.fingerprints()["dataset_fingerprint"] != data.fingerprints()["dataset_fingerprint"]
    assert mixed.validation_fingerprint != data.validation_fingerprint
    parts = mixed.train_data.parts
    assert mixed.num_items == sum(part.num_tokens for part in parts)
    epochs = [60 * 4 * 32 * share / part.num_tokens for share, part in zip((0.75, 0.25), parts, strict=True)]
    described = mixed.description()
    assert described.startswith(f"0.75 of {place / 'corpus'}: ")
    assert f"{epochs[0]:.2f} epochs; 0.25 of {place / 'mixed'}: " in described
    assert described.endswith(f"{epochs[1]:.2f} epochs")
    with mixed.train_batches(0) as batches:
        assert next(batches).tokens.shape == (4, 32)
    assert not mixed.accept_older("dataset_fingerprint", data.fingerprints()["dataset_fingerprint"])


def test_a_vocabulary_that_is_mostly_unused_is_spoken_of(make, caplog):
    with caplog.at_level(logging.WARNING, logger="moda_jax"):
        opened(make(model={"vocab_size": 285}))  # 28 of 285: what padding may add
        assert not caplog.records
        opened(make(model={"vocab_size": 290}))
    assert "model.vocab_size=290: data.tokenizer='bytes' uses only 257 of it" in caplog.text


def test_a_prompt_must_fit_the_model(make):
    opened(make(train={"sample_prompt": "def ", "sample_tokens": 60}))
    with pytest.raises(ValueError, match=r"train\.sample_tokens=61: expected at most 60, because the prompt has 4"):
        opened(make(train={"sample_prompt": "def ", "sample_tokens": 61}))


def test_a_model_that_sees_what_comes_next_is_refused(make):
    with pytest.raises(ValueError, match=r"model\.causal=False: expected True"):
        make(model={"causal": False})
