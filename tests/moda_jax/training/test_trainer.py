"""The real trainer on a tiny model and corpus. Compiling dominates: few runs are made, many things asked of them."""

import functools
import json
import logging
import shutil

import jax
import numpy as np
import pytest
from support.tiny_run import tiny_config, write_corpus
from support.tiny_tokenizer import write_bpe

from moda_jax.data.corpus import list_files, split_documents
from moda_jax.inference.load import load_run
from moda_jax.tasks import language_data
from moda_jax.training.checkpoint import CheckpointError, saved_steps
from moda_jax.training.metrics_file import read_metrics
from moda_jax.training.trainer import TrainingRun

SAMPLE = {"sample_prompt": "def ", "sample_tokens": 10}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_corpus(root / "corpus")
    return root


@pytest.fixture(scope="module")
def make(place):
    """A run in a directory below `place`; keyword arguments change the config's sections."""

    def make_(name, **sections):
        sections["train"] = {"accumulation_steps": 2} | SAMPLE | sections.get("train", {})
        return TrainingRun(tiny_config(place / "corpus", place / "cache", **sections), place / name)

    return make_


@pytest.fixture(scope="module")
def straight(make):
    """60 steps at a stretch: the run, and its result."""
    run = make("straight")
    return run, run.train()


@pytest.fixture(scope="module")
def halves(make):
    """30 steps, a stop, and 30 more by the same config, in a new run."""
    first = make("halves")
    stopped = first.train(stop_at_step=30)
    second = make("halves")
    assert second.step == 30
    return stopped, second, second.train()


@pytest.fixture
def copy(place, straight, request):
    """A finished run in a directory of its own, to be spoiled."""
    name = request.node.name
    shutil.copytree(place / "straight", place / name)
    return place / name


def losses(workdir):
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in read_metrics(workdir)]


def files(directory):
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob("*")}


def test_what_a_run_leaves_behind(straight, place):
    run, result = straight
    workdir = place / "straight"
    assert result.step == result.num_steps == 60
    assert saved_steps(workdir / "checkpoints") == [60, 40]
    assert json.loads((workdir / "config.json").read_text())["model"]["dtype"] == "float32"  # resolved
    assert (workdir / "loss.png").stat().st_size > 5000
    assert list((workdir / "tensorboard").iterdir())
    assert (workdir / "sample.txt").read_text() == result.sample
    assert result.sample.startswith("def ")
    assert f"validation loss {result.validation_loss:.4f} nats per byte" in str(result)
    assert run.config.model.dtype == "float32"


def test_metrics_have_a_line_per_step_with_every_key(straight, place):
    entries = read_metrics(place / "straight")
    keys = ["step", "num_steps", "tokens", "loss", "perplexity", "grad_norm", "learning_rate"]
    keys += ["skipped_updates", "loss_spikes", "tokens_per_second", "mfu"]
    assert [entry["step"] for entry in entries] == list(range(1, 61))
    for entry in entries:
        evaluated = entry["step"] in (25, 50, 60)
        assert list(entry) == keys + (["validation_loss", "validation_perplexity"] if evaluated else [])
        assert entry["tokens"] == entry["step"] * 4 * 32
        assert entry["perplexity"] == pytest.approx(np.exp(entry["loss"]))
        assert entry["tokens_per_second"] > 0
        assert entry["mfu"] is None  # on a CPU
    assert entries[4]["learning_rate"] == pytest.approx(1e-2)  # the peak, when warm-up is over
    assert entries[-1]["learning_rate"] == pytest.approx(1e-3)
    assert entries[0]["loss"] == pytest.approx(np.log(257), abs=0.1)
    assert entries[-1]["loss"] < 3.5
    assert entries[-1]["validation_loss"] == straight[1].validation_loss < 3.5


def test_stop_and_resume_is_bit_equal(straight, halves, place):
    stopped, resumed, result = halves
    assert stopped.step == 30 and stopped.sample is None and "stopped at step 30 of 60" in str(stopped)
    assert losses(place / "halves") == losses(place / "straight")
    assert result.validation_loss == straight[1].validation_loss
    assert result.sample == straight[1].sample
    own = jax.tree.leaves_with_path(resumed._state.params)
    for (path, ours), theirs in zip(own, jax.tree.leaves(straight[0]._state.params), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(path))


def test_a_finished_run_says_so_and_touches_nothing(straight, make, place, caplog):
    before = files(place / "straight")
    result = make("straight", eval={"interval_steps": 7}).train()
    assert "this run is finished, step 60 of 60; nothing to do" in str(result)
    assert result.validation_loss == straight[1].validation_loss
    assert files(place / "straight") == before


def test_another_config_is_refused(straight, make, place):
    before = files(place / "straight")
    with pytest.raises(ValueError, match="holds a run with a different config") as error:
        make("straight", model={"num_layers": 4}, train={"seed": 1, "num_steps": 90})
    assert "model.num_layers: 3 in the directory, 4 now" in str(error.value)
    assert "train.seed: 0 in the directory, 1 now" in str(error.value)
    assert "num_steps" not in str(error.value)
    assert files(place / "straight") == before


def test_more_steps_go_on_and_drop_lines_of_lost_steps(copy, make, caplog):
    """The newest checkpoint is lost, the metrics know more than the checkpoint: steps 41 to 60 are done again."""
    shutil.rmtree(copy / "checkpoints" / "60")
    before = losses(copy)
    with caplog.at_level(logging.INFO, logger="moda_jax"):
        run = make(copy.name, train={"num_steps": 70})
    assert "resuming from step 40 of 70 (checkpoints found: 40)" in caplog.text
    assert "train.num_steps: 60 in the directory, 70 now" in caplog.text
    assert "the learning rate is planned anew from step 40 on, as in a run of 70 steps" in caplog.text
    assert json.loads((copy / "config.json").read_text())["train"]["num_steps"] == 70
    run.train(stop_at_step=44)
    assert [entry["num_steps"] for entry in read_metrics(copy)] == [60] * 40 + [70] * 4
    after = losses(copy)
    assert [step for step, *_ in after] == list(range(1, 45))
    assert after[:40] == before[:40]
    assert after[40] == before[40]  # step 41 starts from the same parameters on the same batch
    assert saved_steps(copy / "checkpoints") == [44, 40]


def test_a_moved_folder_and_another_accumulation_go_on(copy, make, place, caplog):
    """What a user changes who moves to another machine: neither the data nor the function."""
    shutil.rmtree(copy / "checkpoints" / "60")
    shutil.copytree(place / "corpus", place / "moved")
    before = losses(copy)
    data = {"source": str(place / "moved"), "prefetch_batches": 2}
    with caplog.at_level(logging.INFO, logger="moda_jax"):
        run = make(copy.name, data=data, train={"accumulation_steps": 1, "sample_prompt": ""}, eval={"num_batches": 1})
        run.train(stop_at_step=43)
    assert "config changed at step 40: train.accumulation_steps: 2 in the directory, 1 now" in caplog.text
    assert f"config changed at step 40: data.source: {str(place / 'corpus')!r} in the directory" in caplog.text
    assert "from step 40 on sums are rounded in another order" in caplog.text and "anew" not in caplog.text
    for ours, theirs in zip(losses(copy)[40:], before[40:43], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    changes = [json.loads(line) for line in (copy / "changes.jsonl").read_text().splitlines()]
    assert {(change["step"], change["field"]) for change in changes} == {
        (40, field) for field in (
            "data.source", "data.prefetch_batches", "train.accumulation_steps", "train.sample_prompt",
            "eval.num_batches",
        )
    }  # fmt: skip
    steps = [message for message in caplog.messages if message.startswith("step 4") and "tokens/s" in message]
    assert [message.endswith(" left") for message in steps] == [False, True, True]  # the first step tells nothing


def test_other_validation_text_is_said(copy, make, place, caplog):
    """The training split is the same: one file of the validation split has another last letter."""
    data = tiny_config(place / "corpus", place / "cache").data
    split_of, _ = split_documents(list_files(data), data)
    moved = shutil.copytree(place / "corpus", place / "other_validation")
    name = next(path.name for path in sorted(moved.iterdir()) if split_of(path.name.encode()) == "validation")
    (moved / name).write_text((moved / name).read_text() + "x")
    with caplog.at_level(logging.WARNING, logger="moda_jax"):
        make(copy.name, data={"source": str(moved)}, train={"num_steps": 70})
    assert "the validation split is not that of step 60" in caplog.text


def test_a_newest_step_that_is_no_checkpoint_is_passed_over_aloud(copy, make, caplog):
    (copy / "checkpoints" / "61").mkdir()
    with caplog.at_level(logging.INFO, logger="moda_jax"):
        run = make(copy.name, train={"num_steps": 70})
    assert "step 61 is not good and was passed over: CHECKSUMS missing: not a complete checkpoint" in caplog.text
    assert "resuming from step 60 of 70 (checkpoints found: 40, 60)" in caplog.text
    assert (copy / "checkpoints" / "61.damaged").is_dir()
    assert run.train(stop_at_step=61).step == 61


def test_other_data_is_refused(copy, make, place):
    write_corpus(place / "other_corpus", seed=1)
    config = json.loads((copy / "config.json").read_text())
    config["data"]["source"] = str(place / "other_corpus")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="was trained on other data: its dataset_fingerprint is"):
        make(copy.name, data={"source": str(place / "other_corpus")}, train={"num_steps": 70})
    assert json.loads((copy / "config.json").read_text()) == config  # the new num_steps was not stored


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"vocab_size": 100}}, r"model\.vocab_size=100: expected at least 257"),
        ({"data": {"source": "/nowhere"}}, r"data\.source='/nowhere'"),
        ({"train": {"sample_tokens": 61}}, r"train\.sample_tokens=61: expected at most 60"),
        ({"model": {"num_heads": 3, "num_kv_heads": 2}}, r"model\.num_heads=3: expected a multiple"),
        (
            {"data": {"sequence_length": 65}},
            r"data\.sequence_length=65: expected at most model\.max_sequence_length=64",
        ),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(sections, message, make, place):
    with pytest.raises(ValueError, match=message):
        make("refused", **sections)
    assert not (place / "refused").exists()


def test_no_evaluation_no_sample_and_no_checkpoint_but_the_last(make, place):
    run = make(
        "bare", train={"num_steps": 5, "log_interval_steps": 2, "sample_prompt": "", "accumulation_steps": 1},
        eval={"interval_steps": 0}, checkpoint={"interval_steps": 0},
        model={"vocab_size": 300, "num_layers": 1, "depth": "none"},
    )  # fmt: skip
    result = run.train()
    assert (result.validation_loss, result.sample) == (None, None)
    assert [entry["step"] for entry in read_metrics(place / "bare")] == [2, 4, 5]
    assert saved_steps(place / "bare" / "checkpoints") == [5]


@pytest.mark.slow
def test_a_moved_run_of_the_first_version_goes_on_with_its_tokenizer_and_its_documents(place, monkeypatch, caplog):
    """It was begun when .md files were not read and hidden ones were, and its tokenizer.json is gone since."""
    root = place / "moved"
    corpus = write_corpus(root / "corpus", files=20)
    (corpus / "notes.md").write_text("# notes\n" * 20)
    (corpus / "._file_000.txt").write_bytes((corpus / "file_000.txt").read_bytes())
    tokenizer = write_bpe(root / "bpe.json", 280)
    config = tiny_config(
        corpus, root / "cache", model={"vocab_size": 280}, data={"tokenizer": str(tokenizer)}, train={"num_steps": 6}
    )
    with monkeypatch.context() as first_version:
        older = functools.partial(language_data.open_dataset, as_before=True)
        first_version.setattr(language_data, "open_dataset", older)
        TrainingRun(config, root / "run").train(stop_at_step=2)
    assert (root / "run" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    tokenizer.unlink()
    workdir = (root / "run").rename(root / "elsewhere")
    with caplog.at_level(logging.WARNING, "moda_jax"):
        run = TrainingRun(config, workdir)
    assert run.step == 2
    assert "this run was begun when other files of it were read" in caplog.text
    run._release()
    assert load_run(workdir).step == 2
    (workdir / "tokenizer.json").rename(root / "away.json")
    with pytest.raises(ValueError, match=r"data\.tokenizer='.*bpe\.json': no such file"):
        TrainingRun(config, workdir)
    (root / "away.json").rename(workdir / "tokenizer.json")
    write_bpe(tokenizer, 280, ("other", "words"))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "moda_jax"):
        TrainingRun(config, workdir)._release()
    assert "bpe.json': has changed since the run began; the run goes on with its own copy" in caplog.text
    (corpus / "file_001.txt").write_text("other text")
    with pytest.raises(CheckpointError, match="was trained on other data: its dataset_fingerprint is"):
        TrainingRun(config, workdir)
