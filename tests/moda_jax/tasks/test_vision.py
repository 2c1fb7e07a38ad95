"""Vision as a task: a run of the real trainer with the whole recipe, and the parts that it is made of."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_vision import vision_config

from moda_jax import image_param_count
from moda_jax.commands import evaluate
from moda_jax.data.image_pipeline import ImageBatch
from moda_jax.inference.image_run import load_image_run, run_image_maps
from moda_jax.parallel.batches import RowShare
from moda_jax.tasks.registry import find_task, make_task
from moda_jax.tasks.vision import Vision, image_loss, normalised
from moda_jax.training.averaged import averaged_params
from moda_jax.training.diagnosis import non_finite_tensors
from moda_jax.training.metrics_file import read_metrics
from moda_jax.training.trainer import TrainingRun

RECIPE = {
    "crop_scale": 0.6, "rand_augment_magnitude": 3.0, "erase_probability": 0.2, "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0, "label_smoothing": 0.1, "augmentation_repeats": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("vision")


@pytest.fixture(scope="module")
def run(place):
    """A run with everything in it, by its name; it trains to the given step, or to the end."""

    def run_(name, stop=None):
        config = vision_config(
            place / "cache", model={"stochastic_depth": 0.2}, data={"images": RECIPE}, optimizer={"ema_decay": 0.9}
        )
        run = TrainingRun(config, place / name)
        return run, run.train(stop_at_step=stop)

    return run_


@pytest.fixture(scope="module")
def straight(run):
    return run("straight")


def test_a_task_is_found_by_its_name():
    assert find_task("vision") is Vision


@pytest.mark.slow
def test_stop_and_resume_is_bit_equal(straight, run, place):
    _, stopped = run("halves", stop=3)
    assert stopped.step == 3
    resumed, result = run("halves")
    whole, expected = straight
    assert result.validation == expected.validation
    ours, theirs = (
        [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in read_metrics(place / name)]
        for name in ("halves", "straight")
    )
    assert ours == theirs and len(ours) == 6
    for (path, a), b in zip(
        jax.tree.leaves_with_path(resumed._state), jax.tree.leaves(whole._state), strict=True
    ):  # fmt: skip
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_evaluation_gives_the_metrics_of_both_sets_of_weights(straight, place):
    run, result = straight
    last = read_metrics(place / "straight")[-1]
    names = ["validation_loss", "validation_top1", "validation_top5"]
    assert [name for name in last if "validation" in name] == names + [
        name.replace("validation_", "validation_ema_") for name in names
    ]
    assert 0 <= last["validation_top1"] <= last["validation_top5"] <= 100
    assert last["images"] == 6 * 16 and last["images_per_second"] > 0
    assert "nats per image, top1 " in result.validation and "; averaged weights: loss" in result.validation
    # The last evaluation, by hand from the logits of every image.
    function, data = run._task.model, run._data.validation_data
    images = jnp.asarray(np.stack([data.read(i) for i in range(len(data))]))
    for params, prefix in ((run._state.params, ""), (averaged_params(run._state.optimizer_state), "ema_")):
        module = function.module(params)
        probabilities = np.asarray(jax.nn.softmax(module(normalised(images, run.config))), np.float64)
        expected = -np.log(probabilities[np.arange(len(data)), data.labels]).mean()
        assert last[f"validation_{prefix}loss"] == pytest.approx(expected, rel=1e-4)
        order = np.argsort(-probabilities, axis=1)
        assert last[f"validation_{prefix}top1"] == pytest.approx(100 * np.mean(order[:, 0] == data.labels), abs=1e-3)
        found = (order[:, :5] == data.labels[:, None]).any(axis=1)
        assert last[f"validation_{prefix}top5"] == pytest.approx(100 * np.mean(found), abs=1e-3)


def test_its_description(place):
    task = make_task(vision_config(place / "cache"))
    lines = dict(task.description())
    assert f"({image_param_count(task.config.model)}), 2 layers, depth=moda" in lines["model"]
    assert lines["image"] == "8 x 8 x 1 in patches of 4 x 4: 5 tokens, class_token, learned positions"
    data = task.open_data(RowShare(0, 1))
    assert data.description().startswith("digits: ") and data.description().endswith(" training images of 10 classes")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"causal": True}}, r"model\.causal=True: expected False"),
        ({"mesh": {"context": 2}}, r"mesh\.context=2: expected 1: an image's tokens are not split"),
        ({"data": {"images": {"normalisation": "imagenet"}}}, r"data\.images\.normalisation='imagenet': expected one"),
        ({"model": {"depth": "depth_attention", "stochastic_depth": 0.1}}, r"model\.stochastic_depth=0\.1: expected 0"),
        ({"model": {"stochastic_depth": 1.0}}, r"model\.stochastic_depth=1\.0: expected a share in \[0, 1\)"),
        ({"optimizer": {"ema_decay": 1.0}}, r"optimizer\.ema_decay=1\.0: expected a number in \[0, 1\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(sections, message, place):
    with pytest.raises(ValueError, match=message):
        make_task(vision_config(place / "cache", **sections)).model  # noqa: B018  made when it is asked for


def test_more_classes_than_the_head_has_are_refused(place):
    task = make_task(vision_config(place / "cache", model={"image": {"num_classes": 9}}))
    with pytest.raises(ValueError, match=r"model\.image\.num_classes=9: expected at least the 10 classes"):
        task.open_data(RowShare(0, 1))


def batch_of(labels, shares, mask):
    rows = len(mask)
    return ImageBatch(
        np.zeros((rows, 8, 8, 1), np.uint8), np.int32(labels), np.float32(shares), np.float32(mask),
        np.zeros(rows, np.uint32),
    )  # fmt: skip


def test_the_loss_and_its_sums():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7)) * 3, jnp.float32)
    batch = batch_of([[0, 0], [1, 2], [3, 3], [6, 6]], [[1, 0], [0.25, 0.75], [1, 0], [1, 0]], [1, 1, 1, 0])
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    targets = np.zeros((4, 7))
    for row, (pair, shares) in enumerate(zip(batch.labels, batch.label_shares, strict=True)):
        for label, share in zip(pair, shares, strict=True):
            targets[row, label] += share
    for smoothing in (0.0, 0.1):
        smoothed = (1 - smoothing) * targets + smoothing / 7
        expected = -(smoothed * log_p)[:3].sum()
        total, sums = image_loss(logits, batch, 0.0, smoothing)
        assert float(total) == float(sums.loss) == pytest.approx(expected, rel=1e-5)
    z = np.log(np.exp(np.asarray(logits, np.float64)).sum(axis=1))
    total, sums = image_loss(logits, batch, 0.5, 0.0)
    assert float(total - sums.loss) == pytest.approx(0.5 * (z[:3] ** 2).sum(), rel=1e-4)
    order = np.argsort(-log_p, axis=1)[:3]
    first = batch.labels[:3, :1]
    assert (float(sums.num_targets), float(sums.top1), float(sums.top5)) == (
        3, (order[:, :1] == first).sum(), (order[:, :5] == first).any(axis=1).sum(),
    )  # fmt: skip


def test_a_logit_that_is_not_finite_or_tied_is_never_right():
    batch = batch_of([[0, 0], [0, 0]], [[1, 0]] * 2, [1, 1])
    sums = image_loss(jnp.array([[jnp.nan] * 3, [2.0, 2.0, 1.0]]), batch, 0.0, 0.0)[1]
    assert float(sums.top1) == 0


@pytest.mark.slow
def test_the_first_tensor_that_is_not_finite_is_named(straight):
    run, _ = straight
    params = jax.tree.map(jnp.copy, run._state.params)
    params["last_layer"]["ffn"]["up"]["bias"] = params["last_layer"]["ffn"]["up"]["bias"].at[0].set(jnp.nan)
    with run._task.open_data(RowShare(0, 1)).train_batches(0) as batches:
        found = [tensor.name for tensor in non_finite_tensors(run._task, params, next(batches))]
    assert found[:2] == ["parameter last_layer.ffn.up.bias", "output of layer 1 in micro-batch 0"]
    assert found[-2:] == ["logits in micro-batch 1", "loss in micro-batch 1"]


@pytest.mark.slow
def test_a_run_is_loaded_and_its_maps_are_drawn(straight, place, tmp_path):
    run, _ = straight
    loaded = load_image_run(place / "straight", step=6)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, run._state.params)
    averaged = load_image_run(place / "straight", ema=True)
    jax.tree.map(np.testing.assert_array_equal, averaged.params, averaged_params(run._state.optimizer_state))
    text = run_image_maps(loaded, tmp_path / "maps", number=2)
    assert re.search(r"straight, step 6: image 2 of digits \(validation\), a \d, taken for a \d", text)
    assert (tmp_path / "maps" / "attention_maps.png").stat().st_size > 10_000
    masses = json.loads((tmp_path / "maps" / "attention_maps.json").read_text())["depth_mass"]
    assert masses[0] == 0 and 0 < masses[1] < 1
    assert 0 < read_metrics(place / "straight")[-1]["depth_mass"] < 1
    with pytest.raises(ValueError, match=r"--image=10000: expected 0\.\.\d+, an image of digits \(validation\)"):
        run_image_maps(loaded, tmp_path / "maps", number=10000)


@pytest.mark.slow
def test_evaluate_draws_the_maps_and_refuses_what_is_of_texts(straight, place, tmp_path, monkeypatch, capsys):
    assert straight[0].step == 6
    monkeypatch.setattr(evaluate.runtime, "prepare", lambda cache: None)  # it settles the process's own modes
    try:
        evaluate.FLAGS(
            ["", f"--workdir={place / 'straight'}", "--attention-maps", "--image=3", f"--output={tmp_path / 'maps'}"]
        )
        evaluate.evaluate()
        assert "straight, step 6: image 3 of digits (validation)" in capsys.readouterr().out
        assert (tmp_path / "maps" / "attention_maps.png").is_file()
        evaluate.FLAGS(["", "--validation", "--ema"])
        evaluate.evaluate()
        last = read_metrics(place / "straight")[-1]
        assert "straight, step 6, averaged weights: loss " in capsys.readouterr().out
        found = json.loads((tmp_path / "maps" / "validation.json").read_text())
        assert found["ema"] and found["images"] > 100
        for name in ("loss", "top1", "top5"):
            assert found[name] == pytest.approx(last[f"validation_ema_{name}"], rel=1e-6)
        evaluate.FLAGS(["", "--depth-probes"])
        with pytest.raises(
            ValueError, match=r"its train\.task is 'vision', for which there are --validation and --att"
        ):
            evaluate.evaluate_images("vision")
    finally:
        for name in evaluate.FLAGS:
            evaluate.FLAGS[name].unparse()
        evaluate.FLAGS.unparse_flags()
