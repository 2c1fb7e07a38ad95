"""`python -m moda_jax.interop` as a user calls it, and train.py on what it makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from support import plain_deit
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


@pytest.mark.slow
def test_a_deit_becomes_a_run_with_depth_that_evaluate_reads(tmp_path):
    save_file(plain_deit.make_tensors(size=8, patch=2, channels=1, classes=10, ffn=24), tmp_path / "deit.safetensors")
    sizes = {"width": 12, "num_heads": 3, "num_kv_heads": 3, "head_dim": 4}
    done = interop(
        "import", f"--checkpoint={tmp_path / 'deit.safetensors'}", f"--workdir={tmp_path / 'run'}",
        "--config=configs/vision_quickstart.py:moda", f"--config.data.cache_dir={tmp_path / 'cache'}",
        *(f"--config.model.{name}={value}" for name, value in sizes.items()),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 0, " in done.stdout and "depth='moda'" in done.stdout
    model = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert (model["num_layers"], model["ffn_width"], model["image"]["patch_size"]) == (3, 24, 2)
    done = call("evaluate.py", f"--workdir={tmp_path / 'run'}", "--validation", "--ema")
    assert done.returncode == 0, done.stderr
    assert "run, step 0, averaged weights: loss " in done.stdout and "over 343 images of digits" in done.stdout


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
        (
            ["import", "--checkpoint=pyproject.toml", "--workdir=TMP/run"],
            "error: --config: missing; a vision transformer needs one, as in --config=configs/deit_tiny.py:none",
        ),
        pytest.param(
            ["import", "--checkpoint=pyproject.toml", "--workdir=TMP/run", "--config=configs/base.py"],
            "error: train.task='language': the checkpoint is a vision transformer",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["import", "--checkpoint=docs", "--workdir=TMP/run", "--config=configs/deit_tiny.py"],
            "error: train.task='vision': the checkpoint is a language model",
            marks=pytest.mark.slow,
        ),
        pytest.param(["move"], "error: 'move': expected one of export, import; see --help", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_command_ends_in_one_line(arguments, line, tmp_path):
    done = interop(*(argument.replace("TMP", str(tmp_path)) for argument in arguments))
    assert done.returncode == 2 and done.stderr.splitlines()[0] == line and "Traceback" not in done.stderr
