"""Every command of README and of the pages in docs/ is run: by the slow test here, by CI itself, or by another test.
What needs a GPU, a cluster or a download is named with the reason, and its flags are checked (`test_documents`)."""

import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from support.pages import ROOT, TEXTS, commands
from support.tiny_run import write_corpus

from moda_jax.config import Config

# Of the quickstart: small enough to be compiled in seconds, and two steps of it.
TINY = """
--config.model.num_layers=2 --config.model.width=16 --config.model.num_heads=2 --config.model.num_kv_heads=1
--config.model.head_dim=8 --config.model.ffn_width=16 --config.model.max_sequence_length=32
--config.data.sequence_length=32 --config.data.cache_dir=cache --config.train.num_steps=2 --config.train.batch_size=4
--config.train.log_interval_steps=1 --config.train.sample_tokens=4 --config.optimizer.warmup_steps=1
--config.eval.num_batches=1 --config.eval.interval_steps=0
"""
TEXT = "--config.data.source=text"
TINY_IMAGES = """
--config.model.num_layers=2 --config.model.width=16 --config.model.num_heads=2 --config.model.num_kv_heads=2
--config.model.head_dim=8 --config.model.ffn_width=16 --config.data.cache_dir=cache --config.train.num_steps=2
--config.train.batch_size=8 --config.optimizer.warmup_steps=1 --config.eval.num_batches=1
"""
# Names that stand for something of the reader's, and what is there in the test's directory.
STAND_INS = {
    "/data/letters": "text", "/data/books": "books", "python_stdlib": "text", "=RUN": "=runs/quickstart",
    "DIRECTORY": "exported_too",
    "runs/experiments/table6/table6.json": str(ROOT / "experiments" / "results" / "table6.json"),
}  # fmt: skip
RUNS = "runs/quickstart", "runs/wsd", "runs/muon"  # for RUN RUN ...

# In this order, in one directory: command -> what is added to it. Of two values of a flag the second holds.
RUN = {
    "train.py --fields": "",
    "train.py --fields optimizer": "",
    "train.py --config=configs/quickstart.py": f"{TINY} {TEXT}",
    "train.py --config=quickstart": f"{TINY} {TEXT}",  # goes on with the same run, which is finished
    "train.py --workdir=runs/quickstart --config.train.num_steps=2000": "--config.train.num_steps=3",
    "train.py --workdir=RUN": "",
    "train.py --config=configs/quickstart.py --config.optimizer.schedule=wsd --config.optimizer.decay_fraction=0.1":
        f"{TINY} {TEXT} --workdir=runs/wsd",
    "train.py --config=configs/quickstart.py --config.optimizer.name=muon": f"{TINY} {TEXT} --workdir=runs/muon",
    "train.py --config=configs/quickstart.py --config.train.init_from=runs/quickstart --workdir=runs/fine "
    "--config.data.source=/data/letters --config.optimizer.schedule=constant --config.optimizer.learning_rate=1e-3":
        TINY,
    "train.py --config=configs/quickstart.py --config.data.source=input.txt": f"{TINY} --workdir=runs/one_file",
    "train.py --config=configs/quickstart.py --config.data.source=stories.txt "
    "--config.data.document_separator=<|endoftext|>": f"{TINY} --workdir=runs/stories",
    "train.py --config=configs/quickstart.py --config.data.source=0.7*python_stdlib + 0.3*/data/books":
        f"{TINY} --workdir=runs/mixture",
    "-m moda_jax.data.tokenizer train --vocab-size=8192 --output=tokenizer.json":
        "--vocab-size=300 --source=text --cache-dir=cache",
    r"generate.py --workdir=runs/quickstart --prompt=    def test_ --stop=\n\n --max-tokens=120 --seed=1":
        "--max-tokens=4",
    "evaluate.py --workdir=runs/quickstart --data=code=tests/support/plain_model.py --data=prose=LICENSE "
    "--tasks=python_words --task-dir=docs/tasks --attention-maps": "--limit=1",
    "generate.py --workdir=runs/quickstart --prompt=def ": "--max-tokens=4",
    "evaluate.py --workdir=runs/quickstart --attention-maps": "",
    "evaluate.py --workdir=RUN --depth-probes": "--probe-tokens=64",
    "train.py --config=configs/quickstart.py --config.train.init_from=runs/quickstart --workdir=runs/tuned "
    "--config.data.source=/data/letters": TINY,
    "-m moda_jax.training.checkpoint verify runs/quickstart": "",
    "-m moda_jax.training.metrics compare RUN RUN": "",
    "-m moda_jax.training.metrics compare RUN RUN ...": "runs/muon --output=compared",
    "-m moda_jax.interop export --workdir=runs/quickstart --output=exported": "",
    "-m moda_jax.interop export --workdir=RUN --output=DIRECTORY": "",
    "train.py --config=configs/vision_quickstart.py": TINY_IMAGES,
    "evaluate.py --workdir=runs/vision_quickstart --attention-maps --image=3": "",
    "evaluate.py --workdir=runs/vision_quickstart --validation --ema": "",
    "-m experiments report table6 --from=runs/experiments/table6/table6.json": "--output=report",
}  # fmt: skip

# Command -> how the lines of CI begin that run it.
CI = {
    "-m pytest": ['eval "$line"'],
    "-m pytest -m slow": ['python -m pytest -m "slow and not precise"', "python -m pytest -m precise"],
    "-m ruff check .": ["python -m ruff check ."],
    "-m ruff format --check .": ["python -m ruff format --check ."],
    "-m sphinx docs build/docs": ["python -m sphinx -W"],
    "-m sphinx -W docs build/docs": ["python -m sphinx -W"],
}

# Command -> the test that runs it.
ELSEWHERE = {
    "-m experiments table6 --tiny --devices=cpu":
        "tests/experiments/test_worker.py::test_a_run_that_is_killed_is_named_and_done_by_the_same_command",
    "-m experiments sweep.py --tiny --devices=cpu --seeds=0":
        "tests/experiments/test_worker.py::test_the_runs_of_a_sweep_share_what_the_first_of_them_compiled",
    "-m moda_jax.training.replay runs/quickstart/faults/STEP":
        "tests/safety/test_nan.py::test_too_many_in_a_row_stop_the_run_and_can_be_replayed",
    "-m moda_jax.interop import --checkpoint=DIRECTORY --workdir=RUN [--config=FILE --config.model.depth=moda ...]":
        "tests/moda_jax/interop/test_interop_script.py::test_a_moda_run_starts_from_an_exported_model_and_trains",
    "-m moda_jax.interop import --checkpoint=model.safetensors --workdir=runs/deit --config=configs/deit_tiny.py:none "
    "--config.data.source=DIRECTORY":
        "tests/moda_jax/interop/test_interop_script.py::test_a_deit_becomes_a_run_with_depth_that_evaluate_reads",
    "evaluate.py --workdir=runs/deit --validation":
        "tests/moda_jax/interop/test_interop_script.py::test_a_deit_becomes_a_run_with_depth_that_evaluate_reads",
    "-m benchmarks.vision --make-images=/tmp/images:2000":
        "tests/benchmarks/test_vision_benchmark.py::test_images_are_made_of_a_natural_size_and_the_same_at_every_call",
}  # fmt: skip

A_GPU, GPUS, PAPERS_SIZE = "needs a GPU", "needs GPUs on one or many machines", "a model or corpus of the paper's size"
A_NAME = "says how a command is called; the others are such calls"
CHECKED = {
    "-m pytest -m gpu": A_GPU,
    "-m pytest -m gpu -k triton tests/pallas_kernels": A_GPU,
    "-m pytest -m gpu tests/moda_jax/parallel": GPUS,
    "-m pytest -m gpu tests/pallas_kernels/test_partition_gpu.py": GPUS,
    "-m pytest tests/PATH": A_NAME,
    "-m pytest -m slow tests/PATH": A_NAME,
    "-m benchmarks.attention": A_GPU,
    "-m benchmarks.attention --implementation=triton": A_GPU,
    "-m benchmarks.attention --grid=vision": A_GPU,
    "-m benchmarks.autotune_triton": A_GPU,
    "-m benchmarks.decode --layouts=packed,fused --batches=64": A_GPU,
    "-m benchmarks.family": A_GPU,
    "-m benchmarks.mesh": GPUS,
    "-m benchmarks.pictures": "draws the committed pictures anew, over them",
    "-m benchmarks.rows": A_GPU,
    "-m benchmarks.scaling": "compiles for up to 1,024 devices: hours",
    "-m benchmarks.short_attention": A_GPU,
    "-m benchmarks.training": A_GPU,
    "-m benchmarks.vision --data=/tmp/images": A_GPU,
    "-m benchmarks.vision --peer=PYTHON --output=vision.json": A_GPU,
    "-m experiments": A_NAME,
    "-m experiments prepare": A_NAME,
    "-m experiments PATH/mine.py": A_NAME,
    "-m experiments mine.py": A_NAME,
    "-m experiments table6": PAPERS_SIZE,
    "-m experiments prepare table6 --corpus=CORPUS --output=corpus.tar.xz": PAPERS_SIZE,
    "-m experiments table6 --data=corpus.tar.xz": PAPERS_SIZE,
    "-m experiments speed table6 --data=corpus.tar.xz": PAPERS_SIZE,
    "-m moda_jax.data.tokenizer": A_NAME,
    "-m moda_jax.interop": A_NAME,
    "-m moda_jax.interop import": A_NAME,
    "generate.py": A_NAME,
    "evaluate.py": A_NAME,
    "train.py": A_NAME,
    "train.py ...": A_NAME,
    "train.py --config=configs/CONFIG.py[:ARGUMENT] [--config.SECTION.KEY=VALUE ...] [--workdir=DIRECTORY]": A_NAME,
    "train.py --config=configs/quickstart.py --config.train.trackers=tensorboard,wandb": "needs the extra wandb",
    "train.py --config=configs/deit_tiny.py:moda --config.data.source=DIRECTORY": "needs ImageNet",
    "train.py --config=configs/deit_tiny.py:moda --config.train.init_from=model.safetensors "
    "--config.data.source=DIRECTORY": "needs ImageNet",
    "train.py --config=configs/moda_700m.py --config.mesh.fsdp=8 --config.train.accumulation_steps=16": GPUS,
    "train.py --config=configs/moda_700m.py --config.mesh.fsdp=8 --config.train.accumulation_steps=4 "
    "--config.data.cache_dir=/shared/cache --workdir=/shared/moda": GPUS,
}

# Programs of shell blocks that are not Python's, and the shell's own words.
OTHERS = {
    "sbatch": GPUS, "srun": GPUS, "kubectl": "needs a cluster; tests/test_kubernetes.py reads the manifest",
    **dict.fromkeys(("#!/bin/bash", "#SBATCH", "code=$?", "if", "exit", "while", "[", "done"), "the shell's"),
}  # fmt: skip

FOUND = {" ".join(words): words for text in TEXTS.values() for words in commands(text)}


def test_every_command_of_the_documents_is_run_or_named_with_the_reason_why_not():
    classes = [*RUN, *CI, *ELSEWHERE, *CHECKED]
    assert len(classes) == len(set(classes)), "a command of two classes"
    new, gone = set(FOUND) - set(classes), set(classes) - set(FOUND)
    assert not new, f"commands that nothing runs: {new}; give each its class in this file"
    assert not gone, f"commands that no document has: {gone}"


def whole_config(words):
    """What `train.py` makes of the arguments."""
    given = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--config"))
    name, _, argument = given.pop("config").removeprefix("configs/").partition(":")
    module = importlib.import_module(f"configs.{name.removesuffix('.py')}")
    values = module.get_config(*([argument] if argument else []))
    for path, value in given.items():
        *sections, field = path.removeprefix("config.").split(".")
        section = functools.reduce(getattr, sections, values)
        section[field] = type(section[field])(value) if section[field] is not None else value
    return Config.from_dict(values.to_dict())


@pytest.mark.parametrize("command", [one for one in CHECKED if re.match(r"train\.py --config=configs/[a-z]", one)])
def test_what_is_not_run_has_a_valid_config(command):
    config = whole_config(FOUND[command])
    assert config.mesh.fsdp == (8 if "fsdp=8" in command else 1)


def test_shell_blocks_call_nothing_else():
    for name, text in TEXTS.items():
        for kind, block in re.findall(r"```(sh|console)\n(.*?)```", text, re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            lines = [line.removeprefix("$ ") for line in lines if kind == "sh" or line.startswith("$ ")]
            for program in (line.split()[0] for line in lines if line):
                known = program in ("python", *OTHERS) or re.fullmatch(r"moda-\w+|[A-Z_]+=\S+", program)
                assert known, f"{name}: {program}: nothing runs it"


def test_what_ci_and_other_tests_run_is_there():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    for command, beginnings in CI.items():
        assert all(any(line.startswith(beginning) for line in lines) for beginning in beginnings), command
    for command, place in ELSEWHERE.items():
        file, name = place.split("::")
        assert f"def {name}(" in (ROOT / file).read_text(), command


def test_every_extra_that_is_installed_is_one_of_the_projects():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, text in TEXTS.items():
        for line in text.splitlines():
            for found in re.findall(r'"(?:\.|moda-jax)\[([\w,]+)\]', line):
                assert set(found.split(",")) <= set(extras), f"{name}: {line}"


def arguments(command, added):
    """Of one of `RUN`: with what stands for the reader's things, and with what is added."""
    runs, given = iter(RUNS), []
    for word in FOUND[command]:
        word = word.replace("\\n", "\n")  # of $'...'
        for name, stand_in in STAND_INS.items():
            word = word.replace(name, stand_in)
        given += [] if word == "..." else [next(runs) if word == "RUN" else word]
    given += shlex.split(added)
    return given if given[0] == "-m" else [str(ROOT / given[0]), *given[1:]]


@pytest.mark.slow
def test_the_commands_run_in_the_order_of_a_first_day(tmp_path):
    for name in ("configs", "docs", "tests", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_corpus(tmp_path / "text")
    write_corpus(tmp_path / "books", seed=1)
    (tmp_path / "input.txt").write_text("To be, or not to be\n" * 200)
    (tmp_path / "stories.txt").write_text("Once upon a time.<|endoftext|>" * 200)
    file = tmp_path / "commands.json"
    file.write_text(json.dumps([arguments(command, added) for command, added in RUN.items()]))
    done = subprocess.run(
        [sys.executable, "-m", "support.several_commands", file], cwd=tmp_path, capture_output=True, text=True,
        timeout=1500, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_DATASETS_OFFLINE": "1",
                          "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
    for run in ("quickstart", "wsd", "muon", "fine", "tuned", "one_file", "stories", "mixture", "vision_quickstart"):
        assert (tmp_path / "runs" / run / "loss.png").is_file(), run
    for made in ("tokenizer.json", "exported/model.safetensors", "report/table6.md", "runs/quickstart/evaluation/"
                 "attention_maps.png", "runs/quickstart/evaluation/depth_probes.json"):  # fmt: skip
        assert (tmp_path / made).is_file(), made
