import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.saved_run import save_run, tiny_run_config
from support.tiny_tokenizer import WORDS, write_bpe

from moda_jax.inference.load import load_run
from moda_jax.training.checkpoint import CheckpointError

# After an error of its own, Orbax leaves a task behind that finds its event loop closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    return workdir, save_run(workdir, tiny_run_config(), steps=(5, 10))


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "run")


def test_the_parameters_come_back_and_nothing_is_written(saved):
    workdir, params = saved
    before = sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*"))
    run = load_run(workdir)
    assert (run.step, run.unit, load_run(workdir, step=5).step) == (10, "byte", 5)
    assert jax.tree.structure(run.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, run.params, params)
    tokens = jnp.zeros((1, 4), jnp.int32)
    np.testing.assert_array_equal(run.model(run.params, tokens), run.model(params, tokens))
    assert sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*")) == before


def test_the_averaged_weights_come_back(tmp_path):
    config = tiny_run_config(optimizer={"warmup_steps": 2, "ema_decay": 0.9, "name": "muon"})
    params = save_run(tmp_path / "run", config)
    averaged, last = load_run(tmp_path / "run", ema=True), load_run(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, averaged.params, jax.tree.map(lambda leaf: 2.0 * leaf, params))
    jax.tree.map(np.testing.assert_array_equal, last.params, params)


def test_a_run_without_averaged_weights_says_so(saved):
    with pytest.raises(ValueError, match=r"^--ema: .*run has no averaged weights; it is trained with optimizer\.ema_d"):
        load_run(saved[0], ema=True)


def test_a_save_that_is_under_way_is_left_alone(copy):
    unfinished = copy / "checkpoints" / "15.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert load_run(copy).step == 10
    assert unfinished.is_dir()


def test_matrices_are_cast_once_to_the_compute_dtype(copy):
    values = json.loads((copy / "config.json").read_text())
    values["model"] |= {"dtype": "bfloat16", "attention_implementation": "reference"}
    (copy / "config.json").write_text(json.dumps(values))
    run = load_run(copy)
    assert run.params["embedding"]["table"].dtype == jnp.bfloat16
    assert run.params["layers"]["ffn_norm"]["scale"].dtype == jnp.float32
    assert run.config.model.attention_implementation is None  # the best on this device, not on the training's


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: shutil.rmtree(run), r"--workdir=.*run: no such directory; name the directory of a run"),
        (lambda run: (run / "config.json").unlink(), r"--workdir=.*run: holds no config\.json, .* train one first"),
        (lambda run: (run / "config.json").write_text("{"), r"config\.json: not a config of this version"),
        (lambda run: shutil.rmtree(run / "checkpoints"), r"--workdir=.*run: holds no checkpoint yet; train\.py saves"),
    ],
    ids=["no directory", "no config", "broken config", "no checkpoint"],
)
def test_a_directory_that_cannot_be_used_says_what_to_do(copy, break_it, message):
    break_it(copy)
    with pytest.raises(ValueError, match=message):
        load_run(copy)


@pytest.mark.parametrize(
    ("break_it", "step", "reason"),
    [
        (lambda steps: (steps / "12").mkdir(), 12, "CHECKSUMS missing: not a complete checkpoint"),
        (lambda steps: shutil.rmtree(steps / "10" / "state" / "d"), 10, "state/d/"),
        (lambda steps: (steps / "10" / "meta" / "metadata").write_text("{}"), 10, "meta/metadata: "),
    ],
    ids=["empty step", "damaged step", "no record"],
)
def test_a_step_that_is_not_good_is_passed_over_aloud(copy, saved, caplog, break_it, step, reason):
    """As in a resume, but nothing is moved. The step asked for by its number is an error."""
    checkpoints = copy / "checkpoints"
    break_it(checkpoints)
    before = sorted((path, path.stat().st_mtime_ns) for path in copy.rglob("*"))
    with caplog.at_level(logging.WARNING, logger="moda_jax"):
        run = load_run(copy)
    assert run.step == (10 if step == 12 else 5)
    jax.tree.map(np.testing.assert_array_equal, run.params, saved[1])
    (line,) = (record.getMessage() for record in caplog.records if record.name.startswith("moda_jax"))
    assert "\n" not in line and line.startswith(
        f"the checkpoint of step {step} is not good and was passed over: {reason}"
    )
    with pytest.raises(CheckpointError, match=rf"checkpoints/{step}: {reason}.*; name another checkpoint with --step$"):
        load_run(copy, step=step)
    assert load_run(copy, step=5).step == 5
    assert sorted((path, path.stat().st_mtime_ns) for path in copy.rglob("*")) == before


def test_without_a_good_step_there_is_nothing_to_load(copy, caplog):
    (copy / "checkpoints" / "10" / "meta" / "metadata").write_text("{}")
    (copy / "checkpoints" / "5" / "CHECKSUMS").unlink()
    with pytest.raises(CheckpointError) as error:
        load_run(copy)
    message = str(error.value)
    assert message.startswith(f"--workdir={copy}: holds no good checkpoint: step 10: meta/metadata: ")
    assert "; step 5: CHECKSUMS missing: removed, or" in message
    assert "\n" not in message and not caplog.records


def test_a_step_that_is_not_there(saved):
    with pytest.raises(ValueError, match=r"--step=7: no such checkpoint; .* holds 5, 10"):
        load_run(saved[0], step=7)


def test_parameters_of_another_config(copy):
    values = json.loads((copy / "config.json").read_text())
    values["model"]["ffn_width"] = 64
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"its parameters are not those that config\.json describes"):
        load_run(copy)


def test_a_tokenizer_that_does_not_match(tmp_path):
    write_bpe(tmp_path / "own.json", 270)
    write_bpe(tmp_path / "other.json", 270, WORDS[::-1][:6])
    write_bpe(tmp_path / "large.json", 300)
    config = tiny_run_config(model={"vocab_size": 280}, data={"tokenizer": str(tmp_path / "own.json")})
    save_run(tmp_path / "run", config)
    assert load_run(tmp_path / "run").unit == "token"
    (tmp_path / "own.json").rename(tmp_path / "moved.json")
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*own\.json': no such file"):
        load_run(tmp_path / "run")
    assert load_run(tmp_path / "run", tokenizer=str(tmp_path / "moved.json")).step == 10
    with pytest.raises(ValueError, match=r"is not the tokenizer that the run was trained with .* with --tokenizer"):
        load_run(tmp_path / "run", tokenizer=str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match=r"model\.vocab_size=280: expected at least 300"):
        load_run(tmp_path / "run", tokenizer=str(tmp_path / "large.json"))
