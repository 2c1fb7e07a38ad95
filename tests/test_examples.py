"""The examples run as they stand in examples/, with fewer steps."""

import json
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from support.tiny_run import tiny_config, write_corpus
from support.virtual_devices import run_module

import moda_jax
from moda_jax.config import Config
from moda_jax.training.trainer import TrainingRun

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_every_example_is_named_where_people_look():
    text = (EXAMPLES.parent / "docs" / "python_api.md").read_text()
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".ipynb"):
            assert f"(../examples/{path.name})" in text, path.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_nnx", "gpt_linen"])
def test_a_gpt_trains_on_four_devices_and_decodes_what_it_computes(name):
    text = run_module(f"examples.{name}", 20, devices=4, timeout=600)
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+) nats per byte, on 4 devices", text).groups())
    assert 4 < first < 8 and last < 0.8 * first
    assert float(re.search(r"differ by (\S+)", text)[1]) < 1e-3


@pytest.mark.slow
def test_a_mechanism_of_ones_own_trains_in_one_file(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    name = "examples.custom_mechanism:EmbeddingAgain"
    config = tiny_config(corpus, tmp_path / "cache", model={"depth": name}, train={"num_steps": 6})
    TrainingRun(config, tmp_path / "run").train()
    params = moda_jax.load(tmp_path / "run").run.params
    names = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    gates = [leaf for name, leaf in names if "gate" in name and "weight" in name]
    learned = np.concatenate([np.ravel(gate) for gate in gates])
    assert learned.shape == (3,) and (learned != 0).all(), "every layer has learned a gate, which started at 0"


def notebook_cells():
    """The notebook's code, cell by cell."""
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    return notebook, ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_kept_without_outputs():
    notebook, cells = notebook_cells()
    assert notebook["nbformat"] == 4 and len(cells) == 5
    for cell in notebook["cells"]:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
    for cell in cells:
        compile(cell, "quickstart.ipynb", "exec")


@pytest.mark.slow
def test_the_notebooks_cells_run_in_order(tmp_path, monkeypatch):
    """With 4 steps of the 1400, on a small corpus; what IPython shows is kept as paths, without IPython."""
    shown = []
    package, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    package.version_info, display.Image = (9, 0), shown.append  # matplotlib asks which IPython it is in
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)
    corpus = write_corpus(tmp_path / "corpus")
    original = Config.from_dict

    def small(values):
        values["data"] |= {"source": str(corpus), "cache_dir": str(tmp_path / "cache"), "sequence_length": 64}
        values["model"] |= {"width": 32, "head_dim": 8, "ffn_width": 48}
        values["train"] |= {"sample_tokens": 24}
        values["eval"] |= {"num_batches": 2, "depth_mass": False}
        return original(values)

    monkeypatch.setattr(Config, "from_dict", small)
    namespace, (_, cells) = {}, notebook_cells()
    for number, cell in enumerate(cells):
        if number == 0:
            assert "STEPS = 1400" in cell
            cell = cell.replace("STEPS = 1400", "STEPS = 4")
        if number == 3:  # what was written loads as it is
            monkeypatch.setattr(Config, "from_dict", original)
        exec(compile(cell, f"quickstart.ipynb, cell {number}", "exec"), namespace)
    assert [path.name for path in shown] == ["loss.png", "attention_maps.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in shown)
    assert namespace["model"].step == 4 and len(namespace["written"].text) > 0
