"""train.py as a user calls it. Every call costs seconds, so the calls are few."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.selection import quick_of_named
from support.tiny_run import write_corpus

ROOT = Path(__file__).parents[1]
QUICKSTART = "--config=configs/quickstart.py"
TINY = (
    "--config.model.num_layers=2", "--config.model.width=16", "--config.model.num_heads=2",
    "--config.model.num_kv_heads=1", "--config.model.head_dim=8", "--config.model.ffn_width=16",
    "--config.data.sequence_length=32", "--config.train.batch_size=4", "--config.train.num_steps=4",
    "--config.optimizer.warmup_steps=2", "--config.train.sample_tokens=8", "--config.eval.num_batches=2",
    "--config.train.log_interval_steps=2",
)  # fmt: skip


def train(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "train.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        timeout=300, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False,
    )  # fmt: skip


def refused(*arguments):
    """The one line that a refused call prints."""
    done = train(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    return line


@pytest.mark.parametrize(
    ("arguments", "line"),
    quick_of_named(
        {
            "no config": ((), "error: --config: missing; name a config file, as in --config=configs/quickstart.py"),
            "unknown key": (
                (QUICKSTART, "--config.model.num_layer=3"),
                "error: --config.model.num_layer: unknown config key; did you mean --config.model.num_layers?",
            ),
            "wrong type": (
                (QUICKSTART, "--config.model.num_layers=3.5"),
                "error: flag --config.model.num_layers=3.5: invalid literal for int() with base 10: '3.5'",
            ),
            "heads": (
                (QUICKSTART, "--config.model.num_heads=5", "--config.model.num_kv_heads=2"),
                "error: model.num_heads=5: expected a multiple of model.num_kv_heads=2",
            ),
            "unknown argument": (
                ("--config=configs/moda_700m.py:row9",),
                "error: configs/moda_700m.py:row9: unknown argument; known: row1, row2, row3, row4, row5",
            ),
        },
        quick=("heads",),
    ),
)
def test_a_wrong_command_ends_in_one_line(arguments, line):
    assert refused(*arguments) == line


@pytest.mark.slow
def test_debug_shows_the_traceback():
    done = train(QUICKSTART, "--config.model.num_heads=5", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "config.py" in done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(its command, its directory, what the command did)."""
    place = tmp_path_factory.mktemp("run")
    command = (
        QUICKSTART, *TINY, f"--workdir={place / 'run'}", f"--config.data.cache_dir={place / 'cache'}",
        f"--config.data.source={write_corpus(place / 'corpus')}",
    )  # fmt: skip
    return command, place / "run", train(*command)


def test_it_trains_and_then_there_is_nothing_to_do(run):
    command, directory, done = run
    assert done.returncode == 0, done.stderr
    assert f"{directory}: finished, step 4 of 4\nvalidation loss " in done.stdout
    assert "nats per byte" in done.stdout and "sample:\nimport os" in done.stdout
    for expected in ("device ", "parameters", "steps of 128 tokens", "compiled the train step", "step 2/4 | loss "):
        assert expected in done.stderr, expected
    assert "\r" not in done.stderr
    again = train(*command)
    assert again.returncode == 0, again.stderr
    assert "this run is finished, step 4 of 4; nothing to do" in again.stdout


@pytest.mark.slow
def test_another_config_is_refused_and_more_steps_go_on(run):
    command, directory, _ = run
    line = refused(*command, "--config.model.ffn_width=32")
    assert "holds a run with a different config" in line
    own = f"--workdir={directory}"  # the run's own config, with more steps
    line = refused(own, "--config.train.num_step=6")
    assert line == "error: --config.train.num_step: unknown config key; did you mean --config.train.num_steps?"
    longer = train("--config.train.num_steps=6", own)
    assert longer.returncode == 0, longer.stderr
    assert f"{directory}: finished, step 6 of 6\n" in longer.stdout
    assert "planned anew from step 4 on, as in a run of 6 steps" in longer.stderr


@pytest.mark.slow
def test_a_remote_directory_is_refused():
    line = refused(QUICKSTART, "--workdir=gs://bucket/run")
    assert line.startswith("error: --workdir='gs://bucket/run': is remote, and only local paths are read and written;")
