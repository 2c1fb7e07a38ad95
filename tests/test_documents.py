"""README and the pages in docs/ are true: their Python blocks run, their commands and links exist, and no file of the
project cites a document that is not in it."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from support.pages import DOCUMENTS, ROOT, TEXTS, commands, python_blocks
from support.saved_run import save_run, tiny_run_config

from moda_jax.training.console import check_config_arguments

PROJECT = ("moda_jax", "pallas_kernels", "benchmarks", "configs", "examples", "tests", "docs")

every_document = pytest.mark.parametrize("name", TEXTS)


def run_python_blocks(name):
    """The blocks of a document as printed, in order, in one namespace, which is returned."""
    namespace = {}
    for block in python_blocks(TEXTS[name]):
        exec(compile(block, name, "exec"), namespace)
    return namespace


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """A directory in which the run that the pages speak of is there, small and untrained."""
    save_run(tmp_path / "runs" / "quickstart", tiny_run_config())
    monkeypatch.chdir(tmp_path)


def test_python_blocks_run(quickstart):
    namespaces = {name: run_python_blocks(name) for name in TEXTS}
    assert len(python_blocks(TEXTS["README.md"])) == 3
    namespace = namespaces["README.md"]
    assert namespace["stream"].length == 8
    gradients = jax.tree.leaves(namespace["gradients"])
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in gradients)
    # The last layers' writes are read by nobody: every other gradient is there.
    assert all(jnp.any(leaf[:-1] != 0) for leaf in gradients)
    assert "attention_1" in namespace["variables"]["params"]


def test_the_first_screen_holds_the_two_commands():
    first_screen = TEXTS["README.md"].splitlines()[:30]
    assert "python -m pip install -e . && python train.py --config=configs/quickstart.py" in first_screen
    assert 'python -m pip install -e ".[test]" && python -m pytest' in first_screen


def test_the_commands_are_found():
    found = [" ".join(command) for text in TEXTS.values() for command in commands(text)]
    assert "train.py --config=configs/quickstart.py" in found
    assert any(command.startswith("train.py") and command.endswith("--workdir=/shared/moda") for command in found), (
        "the command inside sbatch's --wrap"
    )
    assert any(command.startswith("-m moda_jax.training.checkpoint verify") for command in found)
    assert any(command.startswith("evaluate.py") and command.endswith("--attention-maps") for command in found)


@every_document
def test_a_documents_commands_exist(name):
    """Scripts and modules are there, every flag is one of theirs, config files and the keys of `--config.` too."""
    for command in commands(TEXTS[name]):
        shown = f"{name}: python {' '.join(command)}"
        if command[0] == "-m":
            if command[1] in ("pytest", "sphinx", "ruff"):
                continue
            specification = importlib.util.find_spec(command[1])
            assert specification is not None, shown
            sources = list(Path(specification.origin).parent.glob("*.py"))  # a command may hand on to a neighbour
        else:
            assert (ROOT / command[0]).is_file(), shown
            sources = [ROOT / "moda_jax" / "commands" / command[0]]
        source = "".join(path.read_text() for path in sources)
        arguments = [argument.strip("[]") for argument in command if argument.strip("[").startswith("--")]
        arguments = [argument for argument in arguments if "SECTION.KEY" not in argument]
        for argument in arguments:
            flag = argument.removeprefix("--").partition("=")[0]
            if not flag.startswith("config.") and flag not in ("help", "fields"):
                names = (f'"{flag}"', f'"--{flag}"', f'"{flag.replace("-", "_")}"')
                assert any(name in source for name in names), f"{shown}: no flag --{flag}"
        check_config_arguments(
            [argument for argument in arguments if "config=FILE" not in argument and "/CONFIG.py" not in argument]
        )


@every_document
def test_a_documents_links_lead_to_files(name):
    for target in re.findall(r"\]\(([^)#\s]+)", TEXTS[name]):
        if "://" not in target:
            assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


def test_no_file_cites_a_document_that_is_not_there():
    paths = [*DOCUMENTS, ROOT / "pyproject.toml", ROOT / ".ci" / "run", *ROOT.glob("*.py")]
    for directory in PROJECT:
        paths += [p for p in (ROOT / directory).rglob("*") if p.suffix in (".py", ".sh", ".yaml", ".toml")]
    for path in paths:
        if not path.is_file():
            continue
        for cited in re.findall(r"\b(?:[A-Z][A-Z_]+|docs/[\w/]+)\.md\b", path.read_text()):
            assert (ROOT / cited).exists(), f"{path.relative_to(ROOT)} cites {cited}"
