import numpy as np
import pytest
from support.saved_run import loaded_run, log_probs, tiny_run_config

from moda_jax.data.packing import Batch
from moda_jax.inference import depth_probes


@pytest.fixture(scope="module")
def run():
    return loaded_run(tiny_run_config(model={"num_layers": 3, "max_sequence_length": 16}, data={"sequence_length": 16}))


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(0).integers(0, 257, (1, 17)).astype(np.int32)
    positions = np.arange(16, dtype=np.int32)[None]
    return Batch(tokens[:, :-1], tokens[:, 1:], np.zeros((1, 16), np.int32), positions, np.ones((1, 16), np.float32))


def test_rules_by_name(run):
    rules = depth_probes.hidings(run.config.model)  # slots: attention 0, FFN 0, attention 1, FFN 1
    seen = {name: [np.flatnonzero(row).tolist() for row in visible] for name, visible in rules.items()}
    assert seen["none"] == [[], [0, 1], [0, 1, 2, 3]]
    assert seen["all"] == [[], [], []]
    assert seen["kind:attention"] == [[], [1], [1, 3]] and seen["kind:ffn"] == [[], [0], [0, 2]]
    assert seen["layer:0"] == [[], [], [2, 3]] and seen["layer:1"] == [[], [0, 1], [0, 1]]
    assert seen["only last:1"] == [[], [1], [3]] and seen["only first:1"] == [[], [0], [0]]
    assert seen["only last:2"] == [[], [0, 1], [2, 3]] and seen["only every:2"] == [[], [0], [0, 2]]
    assert seen["only first:1 and last:1"] == [[], [0, 1], [0, 3]]


def test_losses_and_masses_of_a_batch(run, batch):
    rules = {name: depth_probes.hidings(run.config.model)[name] for name in ("all", "layer:1")}
    values = depth_probes.probe(run, [batch, batch], rules)
    own = -log_probs(run, batch.tokens[0])[np.arange(16), batch.targets[0]].mean()
    assert values["losses"]["none"] == pytest.approx(own, abs=2e-5)
    assert values["tokens"] == 32
    assert len({round(loss, 4) for loss in values["losses"].values()}) == len(values["losses"])
    mass = np.array(values["slot_mass"])
    assert mass.shape == (3, 4) and (mass[0] == 0).all() and (mass[2] > 0).all()
    assert values["depth_mass"] == pytest.approx(mass[1:].sum() / 2, abs=1e-5)
    by_kind = depth_probes.mass_by_kind(values)
    np.testing.assert_allclose(by_kind["attention"], mass[:, 0] + mass[:, 2])
    np.testing.assert_allclose(by_kind["ffn"], mass[:, 1] + mass[:, 3])
    assert "layer:1" in depth_probes.format_table(values)


def test_a_picture(run, batch, tmp_path):
    values = depth_probes.probe(run, [batch], {})
    depth_probes.draw(values, tmp_path / "probes.png", title="a title")
    assert (tmp_path / "probes.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_probe(run):
    with pytest.raises(ValueError, match="got no batch, expected at least one"):
        depth_probes.probe(run, [])
    none = tiny_run_config(model={"depth": "none"}).model
    with pytest.raises(ValueError, match=r"model\.depth='none'"):
        depth_probes.hidings(none)
