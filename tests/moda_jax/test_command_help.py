"""The help of every command is tried in a process of its own by a slow test; here is what it is made of."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from moda_jax import command_help
from moda_jax.commands import evaluate, generate, train
from moda_jax.interop import __main__ as interop

ROOT = Path(__file__).parents[2]


def test_every_field_has_a_meaning_and_a_default():
    text = command_help.fields_text()
    assert "--config.train.num_steps (int, default 10000)\n    optimizer steps of the whole run." in text
    assert "--config.model.mhc.streams (int, default 4)\n    n, residual streams, at least 2." in text
    assert "--config.model.rope_theta (float | None, default " in text
    assert '--config.optimizer.name (str, default \'adamw\')\n    "adamw"; or "muon", by which the matrices' in text
    assert "--config.optimizer.muon.momentum (float, default 0.95)\n    decay of the running mean" in text
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
    assert command_help.asked_for(arguments, "", flags.FlagValues()) == command_help.fields_text(section)


def test_an_unknown_section_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"--fields=modle: no such section; known: model, model\.denseformer, "):
        command_help.asked_for(["--fields=modle"], "", flags.FlagValues())


def test_nothing_is_asked_for():
    assert command_help.asked_for(["--config=quickstart", "--workdir=help"], "", flags.FlagValues()) is None


@pytest.mark.parametrize("command", [train, generate, evaluate, interop], ids=lambda module: module.__name__)
@pytest.mark.parametrize("argument", ["-h", "--help"])
def test_help_shows_the_description_and_every_flag(command, argument):
    text = command_help.asked_for([argument], command.__doc__, command.FLAGS)
    assert text.startswith(command.__doc__.splitlines()[0])
    shown = [line.split()[0].replace("[no]", "") for line in text.splitlines() if line.startswith("--")]
    assert {f"--{name}" for name in command.FLAGS} | {"--debug"} <= set(shown)
    assert ("Configs by name: base, " in text) == ("config" in command.FLAGS)
    assert ("--fields [SECTION] lists" in text) == ("config" in command.FLAGS)


def test_a_flag_is_shown_with_its_type_its_default_and_its_meaning():
    text = command_help.help_text("", generate.FLAGS)
    assert "\n--max-tokens (int, default 200)\n    Tokens per continuation.\n" in text
    assert "\n--prompt (multi string)\n    Text to continue; may be given several times.\n" in text
    assert "\n--coordinator-address (string)\n" in command_help.help_text("", train.FLAGS)
    assert "\n--[no]attention-maps (bool, default False)\n" in command_help.help_text("", evaluate.FLAGS)


COMMANDS = {
    "train.py": "--workdir", "generate.py": "--max-tokens", "evaluate.py": "--[no]depth-probes",
    "-m experiments": "--devices", "-m experiments report": "--from", "-m experiments speed": "--steps",
    "-m experiments prepare": "--corpus", "-m moda_jax.interop": "--export-dtype",
    "-m moda_jax.interop import": "--checkpoint", "-m moda_jax.data.tokenizer train": "--vocab-size",
    "-m moda_jax.training.metrics compare": "--output", "-m moda_jax.training.checkpoint": "verify",
    "-m moda_jax.training.replay": "WORKDIR/faults/STEP",
    **{f"-m benchmarks.{path.stem}": "usage: " for path in sorted((ROOT / "benchmarks").glob("*.py"))
       if "__main__" in path.read_text()},
}  # fmt: skip


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """(exit code, what was printed, what was said beside it) of every command and argument."""
    asked = [(command, "-h") for command in COMMANDS] + [("train.py", "--help")]
    place = tmp_path_factory.mktemp("helps")
    file = place / "commands.json"
    file.write_text(json.dumps([[*command.split(), argument] for command, argument in asked]))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", "support.several_commands", file, place], cwd=ROOT, timeout=600, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0
    ends = (".code", ".out", ".err")
    return {which: [(place / f"{i}{end}").read_text() for end in ends] for i, which in enumerate(asked)}


@pytest.mark.slow
@pytest.mark.parametrize(("command", "argument"), [*((command, "-h") for command in COMMANDS), ("train.py", "--help")])
def test_every_command_shows_its_flags_and_ends_well(helps, command, argument):
    code, printed, said = helps[command, argument]
    assert code == "0" and said == "", said
    assert COMMANDS[command] in printed
