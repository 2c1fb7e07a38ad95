"""Built and traced on tiny configs; nothing is compiled here. The trainer's tests run what is built."""

import logging

import jax
import numpy as np
import pytest
from support.tiny_run import tiny_config, write_corpus

from moda_jax.data.packing import batch_layout
from moda_jax.model.function import parameter_kinds
from moda_jax.parallel.distribution import Distribution
from moda_jax.training.components import Components, resolve


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("components")
    write_corpus(root / "corpus")
    return root


@pytest.fixture(scope="module")
def build(place):
    """Components of a one-layer model; keyword arguments change the config's sections."""

    def build_(source="corpus", **sections):
        sections["model"] = {"num_layers": 1, "depth": "none"} | sections.get("model", {})
        config = resolve(tiny_config(place / source, place / "cache", **sections))
        return Components(
            config,
            Distribution(
                config,
                batch_layout(config.train.batch_size, config.data.sequence_length),
                parameter_kinds(config.model),
            ),
        )

    return build_


@pytest.fixture(scope="module")
def built(build):
    return build()


def test_resolve_fills_in_what_depends_on_the_device(place):
    config = tiny_config(place / "corpus", place / "cache")
    assert config.model.dtype is None and config.mesh.data == -1
    resolved = resolve(config)
    assert (resolved.model.dtype, resolved.mesh.data) == ("float32", 1)
    assert resolve(resolved) == resolved


def test_the_step_keeps_the_states_shape(built):
    """What the step returns is what it takes: it can be called again and again, and saved."""
    before = jax.tree.map(lambda x: (x.shape, x.dtype), built.abstract_state)
    state, metrics = built.traced_train_step.out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
    assert all(leaf.shape == () for leaf in jax.tree.leaves(metrics))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(built.initialize)) == before


def test_batches_go_on_at_a_position(built):
    with built.train_batches(0) as batches:
        first, second = next(batches), next(batches)
        position = batches.position
    assert first.tokens.shape == (4, 32) and position == 8
    with built.train_batches(4) as batches:
        jax.tree.map(np.testing.assert_array_equal, next(batches), second)


def test_validation_batches_are_as_many_as_the_config_says(built):
    batches = list(built.validation_batches())
    assert [batch.tokens.shape for batch in batches] == [(4, 32)] * 2


def test_without_evaluation_there_is_no_validation_data(build):
    assert build(eval={"interval_steps": 0}).validation_data is None


def test_fingerprints_are_those_of_the_data(built, build, place):
    write_corpus(place / "other", seed=1)
    ours, same, others = built.fingerprints(), build(train={"seed": 1}).fingerprints(), build("other").fingerprints()
    assert same == ours
    assert others["dataset_fingerprint"] != ours["dataset_fingerprint"]
    assert others["tokenizer_fingerprint"] == ours["tokenizer_fingerprint"]


def test_a_vocabulary_that_is_mostly_unused_is_spoken_of(build, caplog):
    with caplog.at_level(logging.WARNING, logger="moda_jax"):
        build(model={"vocab_size": 285})  # 28 of 285: what padding may add
        assert not caplog.records
        build(model={"vocab_size": 290})
    assert "model.vocab_size=290: data.tokenizer='bytes' uses only 257 of it" in caplog.text


def test_a_prompt_must_fit_the_model(build):
    build(train={"sample_prompt": "def ", "sample_tokens": 60})
    with pytest.raises(ValueError, match=r"train\.sample_tokens=61: expected at most 60, because the prompt has 4"):
        build(train={"sample_prompt": "def ", "sample_tokens": 61})


def test_description(built, place):
    lines = dict(built.description())
    assert list(lines) == ["device", "model", "attention", "data", "plan"]
    assert lines["device"] == "1 x cpu (cpu)"
    assert "1 layers, depth=none, compute dtype float32" in lines["model"]
    assert f"({sum(leaf.size for leaf in jax.tree.leaves(built.abstract_state.params))})" in lines["model"]
    assert lines["data"].startswith(f"{place / 'corpus'}: ")
    epochs = 60 * 4 * 32 / built.train_data.num_tokens
    assert lines["plan"] == f"60 steps of 128 tokens (4 x 32 in 1 parts), {epochs:.2f} epochs"


def test_runs_that_differ_in_their_seed_share_all_compiled_programs(build):
    programs = []
    for seed in (0, 7):
        components = build(train={"seed": seed})
        initialize = components.initialize
        programs.append(
            (initialize.func.lower(*initialize.args).as_text(), components.traced_train_step.lower().as_text())
        )
    assert programs[0] == programs[1]


def test_the_seed_gives_the_initial_values(build):
    first, again, other = (build(train={"seed": seed}).initialize() for seed in (3, 3, 4))
    tables = [np.asarray(state.params["embedding"]["table"]) for state in (first, again, other)]
    np.testing.assert_array_equal(tables[0], tables[1])
    assert (tables[0] != tables[2]).any()


@pytest.mark.parametrize(
    ("model", "wanted", "measured"),
    [
        ({"num_layers": 3, "depth": "moda"}, True, True),
        ({"num_layers": 3, "depth": "moda"}, False, False),
        ({}, True, False),
    ],
)
def test_depth_mass_is_measured_where_there_is_a_depth_stream(build, model, wanted, measured):
    assert (build(model=model, eval={"depth_mass": wanted}).depth_mass is not None) == measured
