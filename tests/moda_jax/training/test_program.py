"""Built and traced on tiny configs; nothing is compiled here. The trainer's tests run what is built."""

import jax
import numpy as np
import pytest
from support.tiny_run import tiny_config

from moda_jax.training.program import Program, resolve, state_maker


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The program of a one-layer model; keyword arguments change the config's sections."""
    root = tmp_path_factory.mktemp("program")

    def build_(**sections):
        sections["model"] = {"num_layers": 1, "depth": "none"} | sections.get("model", {})
        return Program(resolve(tiny_config(root / "corpus", root / "cache", **sections)))

    return build_


@pytest.fixture(scope="module")
def built(build):
    return build()


def test_resolve_fills_in_what_depends_on_the_device(tmp_path):
    config = tiny_config(tmp_path / "corpus", tmp_path / "cache")
    assert config.model.dtype is None and config.mesh.data == -1
    resolved = resolve(config)
    assert (resolved.model.dtype, resolved.mesh.data) == ("float32", 1)
    assert resolve(resolved) == resolved


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_the_step_keeps_the_states_shape(built):
    """What the step returns is what it takes: it can be called again and again, and saved."""
    state, metrics = built.trace_train_step().out_info
    assert shapes(state) == shapes(built.abstract_state)
    assert all(leaf.shape == () for leaf in jax.tree.leaves(metrics))
    assert shapes(jax.eval_shape(built.initialize)) == shapes(built.abstract_state)
    assert shapes(jax.eval_shape(state_maker(built.task.config, built.task), 0)) == shapes(built.abstract_state)


def test_runs_that_differ_in_their_seed_share_all_compiled_programs(build):
    programs = []
    for seed in (0, 7):
        program = build(train={"seed": seed})
        initialize = program.initialize
        texts = initialize.func.lower(*initialize.args).as_text(), program.trace_train_step().lower().as_text()
        programs.append(texts)
    assert programs[0] == programs[1]


@pytest.mark.parametrize("optimizer", [{}, {"name": "muon", "schedule": "wsd"}], ids=["adamw", "muon"])
def test_runs_that_differ_in_the_numbers_of_their_learning_rate_share_the_compiled_step(build, optimizer):
    """Length, peaks, warm-up, decay and its end are arguments: the text that is compiled, and kept, is the same."""
    numbers = {"learning_rate": 1e-4, "warmup_steps": 9, "final_learning_rate_fraction": 0.0, "decay_fraction": 0.5}
    one = build(optimizer=optimizer)
    other = build(optimizer=optimizer | numbers | {"muon": {"learning_rate": 0.02}}, train={"num_steps": 90})
    assert one.trace_train_step().lower().as_text() == other.trace_train_step().lower().as_text()
    assert all(mine != theirs for mine, theirs in zip(one.plan, other.plan, strict=True))


def test_the_seed_gives_the_initial_values(build):
    first, again, other = (build(train={"seed": seed}).initialize() for seed in (3, 3, 4))
    tables = [np.asarray(state.params["embedding"]["table"]) for state in (first, again, other)]
    np.testing.assert_array_equal(tables[0], tables[1])
    assert (tables[0] != tables[2]).any()


@pytest.mark.parametrize(
    ("model", "wanted", "measured"),
    [
        ({"num_layers": 3, "depth": "moda"}, True, ["depth_mass"]),
        ({"num_layers": 3, "depth": "moda"}, False, []),
        ({"num_layers": 3, "depth": "moda", "moda": {"null_slot": True}}, True, []),
        ({}, True, []),
    ],
)
def test_depth_mass_is_measured_where_the_softmax_is_over_all_slots(build, model, wanted, measured):
    assert list(build(model=model, eval={"depth_mass": wanted}).measures) == measured
