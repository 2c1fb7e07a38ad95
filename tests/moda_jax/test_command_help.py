"""The help of every command is tried in a process of its own by a slow test; here is what it is made of."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moda_jax import command_help

ROOT = Path(__file__).parents[2]


def test_every_field_has_a_meaning_and_a_default():
    text = command_help.fields_text()
    assert "--config.train.num_steps (int, default 10000)\n    optimizer steps of the whole run." in text
    assert "--config.model.mhc.streams (int, default 4)\n    n, residual streams, at least 2." in text
    assert "--config.model.rope_theta (float | None, default " in text
    for entry in text.split("--config.")[1:]:
        assert entry.partition("\n")[2].strip(), entry


def test_one_section():
    names = [line.split()[0] for line in command_help.fields_text("model.moda").splitlines() if line[0] == "-"]
    assert names[:2] == ["--config.model.moda.ffn_kv", "--config.model.moda.attn_kv"]


@pytest.mark.parametrize(
    ("arguments", "section"),
    [(["--fields=eval"], "eval"), (["--fields", "eval"], "eval"), (["--fields"], ""), (["-fields", "--x"], "")],
)
def test_fields_are_asked_for_in_each_form(arguments, section):
    assert command_help.asked_for(arguments, "") == command_help.fields_text(section)


def test_an_unknown_section_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"--fields=modle: no such section; known: model, model\.denseformer, "):
        command_help.asked_for(["--fields=modle"], "")


def test_nothing_is_asked_for():
    assert command_help.asked_for(["--config=quickstart", "--workdir=help"], "") is None


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "generate.py", "evaluate.py"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_a_script_shows_its_flags_and_ends_well(script, flag):
    done = subprocess.run(
        [sys.executable, ROOT / script, flag], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--workdir" in done.stdout and "--[no]debug" in done.stdout
    assert ("Configs by name: base, " in done.stdout) == (script == "train.py")
