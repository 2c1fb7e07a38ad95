"""generate.py as a user calls it. Every call costs seconds, so the calls are few."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.quick_compile import QUICK_XLA_FLAGS
from support.saved_run import save_run, tiny_run_config
from support.selection import quick_of_named

ROOT = Path(__file__).parents[1]
SAMPLED = (
    "--prompt=import os", "--prompt=def", "--max-tokens=9", "--temperature=1", "--top-k=50", "--top-p=0.9", "--seed=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    save_run(workdir, tiny_run_config(data={"cache_dir": str(workdir.parent / "cache")}))
    return workdir


def generate(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "generate.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        timeout=300, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_XLA_FLAGS}, check=False,
    )  # fmt: skip


def test_prompts_are_continued(workdir):
    done = generate(f"--workdir={workdir}", *SAMPLED)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("\n---\n")
    assert first.startswith("import os") and second.startswith("def") and done.stdout.endswith("\n")


@pytest.mark.slow
def test_the_seed_decides(workdir):
    texts = [generate(f"--workdir={workdir}", *SAMPLED, f"--seed={seed}").stdout for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "line"),
    quick_of_named(
        {
            "no workdir": (
                ["--prompt=a"],
                "error: --workdir: missing; name the directory of a run, as in --workdir=runs/quickstart",
            ),
            "long prompt": (
                ["--workdir=RUN", f"--prompt={'x' * 70}"],
                "error: prompt='" + "x" * 37 + "...': has 70 tokens, but the model's context is 64 "
                "(model.max_sequence_length), prompt and continuation together; shorten it",
            ),
            "long seed": (
                ["--workdir=RUN", "--prompt=a", "--seed=18446744073709551616"],
                "error: flag --seed=18446744073709551616: 18446744073709551616 is not an integer in the range "
                "[-9223372036854775808, 9223372036854775807]",
            ),
        },
        quick=("long prompt",),
    ),
)
def test_a_wrong_command_ends_in_one_line(workdir, arguments, line):
    done = generate(*(argument.replace("RUN", str(workdir)) for argument in arguments))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == line and "Traceback" not in done.stderr
