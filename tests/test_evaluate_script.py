"""evaluate.py as a user calls it. Every call costs seconds, so the calls are few."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.local_tasks import write_tasks
from support.quick_compile import QUICK_XLA_FLAGS
from support.saved_run import save_run, tiny_run_config
from support.selection import quick_of_named

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    save_run(workdir, tiny_run_config(data={"cache_dir": str(workdir.parent / "cache")}))
    return workdir


def evaluate(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, ROOT / "evaluate.py", *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        timeout=300, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_XLA_FLAGS, "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip


def test_everything_at_once(workdir, tmp_path):
    (tmp_path / "text.txt").write_text("import os\n" * 20)
    tasks = write_tasks(tmp_path / "tasks")
    done = evaluate(
        f"--workdir={workdir}", f"--data=own={tmp_path / 'text.txt'}", f"--data=again={tmp_path / 'text.txt'}",
        "--tasks=keyword_choice", f"--task-dir={tasks}", "--limit=2", "--attention-maps", "--context=24",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    for expected in ("own", "again", "bits/byte", "keyword_choice", "acc_norm", "attention", "drawn:"):
        assert expected in words, expected
    output = workdir / "evaluation"
    values = json.loads((output / "perplexity.json").read_text())
    assert (values["context"], values["stride"], values["step"]) == (24, 12, 10)
    assert values["domains"][0]["tokens"] == 200
    assert json.loads((output / "tasks.json").read_text())["results"]["keyword_choice"]["sample_len"] == 2
    assert json.loads((output / "attention_maps.json").read_text())["tokens"] == 24
    assert (output / "attention_maps.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "line"),
    quick_of_named(
        {
            "nothing": (
                ["--workdir=RUN"],
                "nothing to do; give --data=NAME=PATH, --tasks=NAME,..., --attention-maps, --depth-probes or, of a "
                "run on images, --validation",
            ),
            "no file": (
                ["--workdir=RUN", "--data=wiki=none.txt"],
                "--data=wiki=none.txt: no such file or directory; expected NAME=PATH of a text file",
            ),
            "no run": (
                ["--workdir=none", "--attention-maps"],
                "--workdir=none: no such directory; name the directory of a run, as train.py's --workdir did",
            ),
        },
        quick=("no file",),
    ),
)
def test_a_wrong_command_ends_in_one_line(workdir, arguments, line):
    done = evaluate(*(argument.replace("RUN", str(workdir)) for argument in arguments))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [f"error: {line}"]
