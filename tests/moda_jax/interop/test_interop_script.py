"""`python -m moda_jax.interop` as a user calls it, and train.py on what it makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.quick_compile import QUICK_XLA_FLAGS
from support.saved_run import save_run, tiny_run_config
from support.tiny_run import write_corpus

ROOT = Path(__file__).parents[3]


def call(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_XLA_FLAGS, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def interop(*arguments):
    return call("-m", "moda_jax.interop", *arguments)


@pytest.mark.slow
def test_a_moda_run_starts_from_an_exported_model_and_trains(tmp_path):
    save_run(tmp_path / "base", tiny_run_config(model={"depth": "none"}))
    done = interop("export", f"--workdir={tmp_path / 'base'}", f"--output={tmp_path / 'olmo2'}")
    assert done.returncode == 0, done.stderr
    assert "transformers reads it as Olmo2ForCausalLM" in done.stdout
    done = interop(
        "import", f"--checkpoint={tmp_path / 'olmo2'}", f"--workdir={tmp_path / 'moda'}", "--config=configs/base.py",
        f"--config.data.source={write_corpus(tmp_path / 'corpus')}", f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--config.data.sequence_length=32", "--config.train.batch_size=4", "--config.train.num_steps=3",
        "--config.optimizer.warmup_steps=1", "--config.eval.num_batches=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "moda" / "config.json").read_text())["model"]
    assert (values["width"], values["depth"], values["moda"]["ffn_kv"]) == (32, "moda", True)
    done = call("train.py", f"--workdir={tmp_path / 'moda'}")
    assert done.returncode == 0, done.stderr
    assert "resuming from step 0 of 3" in done.stderr and "finished, step 3 of 3" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        pytest.param(
            ["export", "--output=x"],
            "error: --workdir: missing, as in --workdir=runs/quickstart",
            marks=pytest.mark.slow,
        ),
        (
            ["import", "--checkpoint=docs", "--workdir=TMP/run"],
            "error: docs: holds no config.json; expected a directory of config.json and safetensors",
        ),
        pytest.param(["move"], "error: 'move': expected one of export, import; see --help", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_command_ends_in_one_line(arguments, line, tmp_path):
    done = interop(*(argument.replace("TMP", str(tmp_path)) for argument in arguments))
    assert done.returncode == 2 and done.stderr.splitlines()[0] == line and "Traceback" not in done.stderr
