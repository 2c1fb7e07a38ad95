"""`train.init_from`: what a run may start with, what it keeps of it, and that it resumes itself."""

import dataclasses
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from support import plain_deit
from support.mechanisms import case_config
from support.saved_run import save_run
from support.tiny_run import tiny_config, write_corpus
from support.tiny_vision import vision_config
from support.virtual_devices import run_module

from moda_jax.config import TransformerConfig
from moda_jax.inference.image_run import load_image_run
from moda_jax.interop.deit import load_deit
from moda_jax.interop.exchange import export_model
from moda_jax.interop.start import fitted, starting_params
from moda_jax.model.function import split_model
from moda_jax.training.averaged import averaged_params, restarted_average
from moda_jax.training.metrics_file import read_metrics
from moda_jax.training.trainer import TrainingRun

KEY = jax.random.key(1)


def model(**fields):
    values = {
        "vocab_size": 29, "num_layers": 3, "width": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4,
        "ffn_width": 24, "max_sequence_length": 32, "depth": "none",
    }  # fmt: skip
    return TransformerConfig(**values | fields)


def shapes(config):
    return jax.eval_shape(lambda: split_model(config, KEY)[1])


def zeros(config):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes(config))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run with depth and its export, and an export without depth."""
    root = tmp_path_factory.mktemp("start")
    for name, seed in (("corpus", 0), ("other", 1)):
        write_corpus(root / name, seed=seed)
    config = tiny_config(root / "corpus", root / "cache", model={"depth": "moda", "dtype": "float32"})
    export_model(config.model, save_run(root / "moda", config, steps=(5, 7), seed=3), root / "moda_export")
    bare, random = dataclasses.replace(config.model, depth="none"), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes(bare))
    export_model(bare, params, root / "none_export")
    return root


@pytest.fixture
def config(place):
    """Of a new run on other data by another schedule; keyword arguments change sections."""

    def config_(init_from, **sections):
        sections["train"] = {"init_from": str(init_from), "num_steps": 6} | sections.get("train", {})
        sections["optimizer"] = {"schedule": "constant"} | sections.get("optimizer", {})
        sections["model"] = {"dtype": "float32"} | sections.get("model", {})
        return tiny_config(place / "other", place / "cache", **sections)

    return config_


def assert_equal(ours, theirs):
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def test_a_run_and_its_export_give_the_same_parameters(place, config, caplog):
    with caplog.at_level(logging.INFO, logger="moda_jax"):
        of_run = starting_params(config(place / "moda"))
    assert f"starting from {place / 'moda'}, step 7 of 60: its parameters, a fresh optimizer, step 0" in caplog.text
    assert "started close to" not in caplog.text
    with caplog.at_level(logging.INFO, logger="moda_jax"):
        assert_equal(of_run, starting_params(config(place / "moda_export")))
    assert f"starting from {place / 'moda_export'}, an export: its parameters" in caplog.text
    assert jax.tree.map(jnp.shape, of_run) == jax.tree.map(jnp.shape, shapes(config("x").model))


def test_depth_is_added_to_a_source_without_and_said(place, config, caplog):
    with caplog.at_level(logging.INFO, logger="moda_jax"):
        params = starting_params(config(place / "none_export"))
    said = f"not in {place / 'none_export'}, and started close to what it does without: layers.depth.ffn_kv.kernel"
    assert said in caplog.text
    new = params["layers"].pop("depth")
    assert_equal(params, starting_params(config(place / "none_export", model={"depth": "none"})))
    assert np.all(np.asarray(new["ffn_kv"]["kernel"])[:, :, 1] == 0)  # values: a new slot adds nothing


@pytest.mark.parametrize("name", ["attnres", "mhc", "hc", "mudd", "denseformer", "value_residual", "depth_attention"])
def test_every_mechanism_can_be_added(name):
    """What it has beside the source is its own, by name."""
    config = case_config(name)
    base = dataclasses.replace(config, depth="none")
    added = []
    params = jax.eval_shape(lambda: fitted(base, zeros(base), config, KEY, "x", added))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes(config))
    assert added


def test_a_mechanisms_further_parameters_are_added_too():
    base, added = model(depth="moda", depth_ffn_kv=False), []
    ours = model(depth="moda", depth_ffn_kv=True)
    params = jax.eval_shape(lambda: fitted(base, zeros(base), ours, KEY, "x", added))
    assert added == ["layers.depth.ffn_kv.kernel"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes(ours))


@pytest.mark.parametrize(
    ("base", "ours", "message"),
    [
        ({"num_heads": 2, "head_dim": 8, "num_kv_heads": 1}, {}, r"model\.num_heads=4: train\.init_from='x' has 2"),
        ({"norm": "pre"}, {}, r"model\.norm='post': train\.init_from='x' has 'pre'"),
        ({"depth": "moda"}, {}, r"model\.depth='none': train\.init_from='x' has 'moda'; depth can be kept, or added"),
        (
            {"ffn_width": 32, "vocab_size": 31}, {},
            r"are not those of this config's model:\n  embedding\.table: \[31, 16\] there, \[29, 16\] here\n  "
            r"last_layer\.ffn\.down\.kernel: \[32, 16\] there, \[24, 16\] here",
        ),
        ({"num_layers": 4}, {}, r"layers\.attention\.key\.kernel: \[3, 16, 2, 4\] there, \[2, 16, 2, 4\] here"),
        ({}, {"tie_embeddings": False}, r"head\.kernel: not there, \[16, 29\] here"),
        ({"tie_embeddings": False}, {}, r"head\.kernel: \[16, 29\] there, not here"),
    ],
)  # fmt: skip
def test_another_model_is_refused_by_name(base, ours, message):
    base = model(**base)
    with pytest.raises(ValueError, match=message):
        fitted(base, zeros(base), model(**ours), KEY, "train.init_from='x'", [])


def test_what_reads_the_same_parameters_otherwise_is_said(caplog):
    base = model(rope_theta=10000.0)
    with caplog.at_level(logging.WARNING, logger="moda_jax"):
        fitted(base, zeros(base), model(rope_theta=1e6, max_sequence_length=64), KEY, "train.init_from='x'", [])
    assert [r.getMessage() for r in caplog.records] == [
        "model.rope_theta: 10000.0 in train.init_from='x', 1000000.0 now"
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"train\.init_from='.*nothing': no such directory; expected a run's, or an export's"),
        (
            "corpus",
            r"train\.init_from='.*corpus': holds no checkpoints/ and no config\.json: no run and",
        ),
        ("empty", r"train\.init_from='.*empty': holds no good checkpoint"),
    ],
)
def test_a_place_without_parameters_is_refused(place, config, name, message):
    if name == "empty" and not (place / name).exists():
        (place / name / "checkpoints").mkdir(parents=True)
        shutil.copy(place / "moda" / "config.json", place / name)
    with pytest.raises(ValueError, match=message):
        starting_params(config(place / name))


def test_a_new_run_has_the_parameters_and_nothing_else(place, config):
    wanted = config(place / "moda")
    with pytest.raises(ValueError, match=r"train\.init_from=.*: is read by moda_jax\.interop\.start\.starting_params"):
        TrainingRun(wanted, place / "refused")
    with pytest.raises(ValueError, match=r"train\.init_from=.*: is the run's own directory"):
        TrainingRun(config(place / "refused"), place / "refused", starting_params)
    assert not (place / "refused").exists()
    wanted = config(place / "moda", optimizer={"ema_decay": 0.9})
    run = TrainingRun(wanted, place / "new", starting_params)
    run._release()
    assert run.step == 0 and run._position == 0
    source = starting_params(wanted)
    table = np.asarray(run._state.params["embedding"]["table"])
    np.testing.assert_array_equal(table[:257], source["embedding"]["table"])
    assert_equal(run._state.params["layers"], source["layers"])
    average = averaged_params(run._state.optimizer_state)
    assert_equal(average, run._state.params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(restarted_average(run._state.optimizer_state, 0.0)))


@pytest.fixture
def digits(tmp_path):
    """The config of a new run on the digits, whose model is that of `plain_deit`; keyword arguments change sections."""

    def config_(init_from, **sections):
        sizes = {"width": 12, "num_heads": 3, "num_kv_heads": 3, "head_dim": 4, "ffn_width": 20, "num_layers": 3}
        sections["model"] = sizes | {"depth": "none", "dtype": "float32"} | sections.get("model", {})
        return vision_config(tmp_path / "cache", train={"init_from": str(init_from), "num_steps": 2}, **sections)

    return config_


def write_deit(path, **options):
    path.parent.mkdir(exist_ok=True)
    save_file(plain_deit.make_tensors(size=8, patch=4, channels=1, classes=10, **options), path)
    return path


def test_a_vision_transformer_starts_from_timms_layout_and_gets_depth(digits, tmp_path, caplog):
    path = write_deit(tmp_path / "deit" / "model.safetensors")
    base = nnx.to_pure_dict(nnx.state(load_deit(path, num_heads=3)[1], nnx.Param))
    for place in (path, path.parent):
        with caplog.at_level(logging.INFO, logger="moda_jax"):
            assert_equal(starting_params(digits(place)), base)
        assert f"starting from {place}, a vision transformer in timm's layout: its parameters" in caplog.text
    with caplog.at_level(logging.INFO, logger="moda_jax"):
        params = starting_params(digits(path, model={"depth": "moda", "stochastic_depth": 0.1}))
    assert "started close to what it does without: layers.depth.ffn_kv.kernel" in caplog.text
    params["layers"].pop("depth")
    assert_equal(params, base)


@pytest.mark.parametrize("depth", ["none", "moda"])
def test_a_head_over_other_classes_begins_anew(depth, digits, tmp_path, caplog):
    path = tmp_path / "model.safetensors"
    save_file(plain_deit.make_tensors(size=8, patch=4, channels=1, classes=7), path)
    base = nnx.to_pure_dict(nnx.state(load_deit(path, num_heads=3)[1], nnx.Param))
    config = digits(path, model={"depth": depth})
    with caplog.at_level(logging.INFO, logger="moda_jax"):
        params = starting_params(config)
    assert f"model.image.num_classes: 7 in {path}, 10 now: the head begins anew" in caplog.text
    assert not any(record.levelname == "WARNING" for record in caplog.records)
    head = params.pop("head")
    assert base.pop("head")["kernel"].shape == (12, 7)
    assert head["kernel"].shape == (12, 10) and 0.01 < np.std(head["kernel"]) < 0.04
    assert head["bias"].shape == (10,) and not np.any(head["bias"])
    params["layers"].pop("depth", None)
    assert_equal(params, base)


def test_with_a_new_head_all_else_must_match(digits, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(plain_deit.make_tensors(size=16, patch=4, channels=1, classes=7, depth=2), path)
    with pytest.raises(ValueError, match="its parameters are not those of this config's model") as refused:
        starting_params(digits(path))
    said = str(refused.value)
    assert "position_table: [17, 12] there, [5, 12] here" in said and "layers.ffn.up.kernel: [1, 12, 20] there" in said
    assert "head." not in said


@pytest.mark.slow
def test_a_run_is_tuned_on_other_classes(digits, tmp_path):
    """A run of ours, for other classes."""
    path = tmp_path / "model.safetensors"
    save_file(plain_deit.make_tensors(size=8, patch=4, channels=1, classes=10), path)
    source = TrainingRun(digits(path), tmp_path / "source", starting_params)
    source.train()
    image = {"size": 8, "patch_size": 4, "channels": 1, "num_classes": 12}
    config = digits(tmp_path / "source", model={"image": image}, optimizer={"warmup_steps": 1})
    run = TrainingRun(config, tmp_path / "tuned", starting_params)
    theirs = load_image_run(tmp_path / "source").params
    assert_equal(run._state.params["layers"], theirs["layers"])
    assert run._state.params["head"]["kernel"].shape == (12, 12)
    assert run.train().step == 2


def test_another_vision_transformer_is_refused(digits, place, tmp_path):
    path = write_deit(tmp_path / "deit" / "model.safetensors", depth=2)
    with pytest.raises(
        ValueError, match=r"layers\.attention\.key\.kernel: \[1, 12, 3, 4\] there, \[2, 12, 3, 4\] here"
    ):
        starting_params(digits(path))
    with pytest.raises(ValueError, match=r"init_from=.*: num_heads=5: expected a divisor of the width 12"):
        starting_params(digits(path, model={"num_heads": 5, "num_kv_heads": 5}))
    with pytest.raises(ValueError, match=r"train\.task='vision': train\.init_from=.* is a run of 'language'"):
        starting_params(digits(place / "moda"))
    with pytest.raises(
        ValueError, match=r"holds no checkpoints/ and no model\.safetensors of a vision transformer in t"
    ):
        starting_params(digits(place / "moda_export"))


@pytest.mark.slow
def test_a_run_of_images_starts_from_an_imported_one(digits, tmp_path):
    """The command's import at step 0, then a run with depth from it."""
    path = write_deit(tmp_path / "deit.safetensors")
    base = nnx.to_pure_dict(nnx.state(load_deit(path, num_heads=3)[1], nnx.Param))
    imported = TrainingRun(dataclasses.replace(digits(path)), tmp_path / "imported", starting_params)
    imported.start_from(base)
    assert_equal(load_image_run(tmp_path / "imported").params, base)
    config = digits(tmp_path / "imported", model={"depth": "moda"}, optimizer={"warmup_steps": 1})
    run = TrainingRun(config, tmp_path / "moda", starting_params)
    assert_equal({**run._state.params["layers"], "depth": None}, {**base["layers"], "depth": None})
    assert run.train().step == 2


@pytest.mark.slow
def test_on_a_mesh_every_device_gets_its_part():
    assert run_module("support.start_on_mesh", devices=4).strip() == "25 leaves, 20 split"


@pytest.mark.slow
def test_such_a_run_resumes_itself(place, config, caplog):
    """After a stop it goes on from its own checkpoint, bit for bit; its source may be gone. Before its first checkpoint
    it starts once more."""
    source = shutil.copytree(place / "moda", place / "source")
    wanted = config(source, checkpoint={"interval_steps": 3})
    TrainingRun(wanted, place / "straight", starting_params).train()
    TrainingRun(wanted, place / "halves", starting_params)._release()  # ended before a step was saved
    TrainingRun(wanted, place / "halves", starting_params).train(stop_at_step=3)
    shutil.rmtree(source)
    with caplog.at_level(logging.INFO, logger="moda_jax"):
        resumed = TrainingRun(wanted, place / "halves", starting_params)
    assert "resuming from step 3 of 6" in caplog.text and "was where this run started; it is not read" in caplog.text
    assert "starting from" not in caplog.text
    resumed.train()
    straight, halves = (
        [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in read_metrics(place / name)]
        for name in ("straight", "halves")
    )
    assert len(straight) == 6 and halves == straight
    with pytest.raises(ValueError, match=r"train\.init_from: '.*source' in the directory, '.*moda' now"):
        TrainingRun(config(place / "moda", checkpoint={"interval_steps": 3}), place / "halves", starting_params)
