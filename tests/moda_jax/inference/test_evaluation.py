"""What evaluate.py chooses by itself; its output is tested by tests/test_evaluate_script.py."""

import dataclasses
import json

import numpy as np
import pytest
from support.saved_run import loaded_run, tiny_run_config
from support.tiny_run import write_corpus

from moda_jax.inference import evaluation
from moda_jax.inference.perplexity import Domain


@pytest.fixture(scope="module")
def run():
    return loaded_run(tiny_run_config())


def test_the_text_of_the_maps_fills_the_context_if_one_can(run):
    documents = [b"short", b"a" * 40, b"b" * 50]
    tokens, source = evaluation._map_text(run, [Domain("x", documents), Domain("y", [b"c" * 99])], 32)
    assert tokens.tolist() == [97] * 32 and source == "x"
    tokens, _ = evaluation._map_text(run, [Domain("x", documents)], 60)
    assert tokens.tolist() == [98] * 50  # none does: the longest


def test_without_a_domain_the_maps_show_validation_text(run, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    data = dataclasses.replace(
        run.config.data, source=str(corpus), cache_dir=str(tmp_path / "cache"), validation_fraction=0.2
    )
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
    tokens, _ = evaluation._map_text(run, [], 48)
    texts = [path.read_bytes() for path in corpus.iterdir()]
    assert any(text.startswith(np.uint8(tokens).tobytes()) for text in texts) and len(tokens) == 48


def test_a_name_that_is_given_twice(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"--data=a=\.\.\.: given twice; give every domain its own name"):
        evaluation.check_perplexity([f"a={tmp_path / 'a.txt'}"] * 2)


def test_depth_probes_of_the_validation_split(run, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    data = dataclasses.replace(
        run.config.data, source=str(corpus), cache_dir=str(tmp_path / "cache"), validation_fraction=0.2
    )
    train = dataclasses.replace(run.config.train, batch_size=4, accumulation_steps=2)
    probed = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data, train=train))
    text = evaluation.run_depth_probes(probed, tmp_path / "out", tokens=128)
    values = json.loads((tmp_path / "out" / "depth_probes.json").read_text())
    assert 100 < values["tokens"] <= 128  # two batches of two rows; targets never cross documents
    assert values["losses"]["all"] != values["losses"]["none"] and values["kinds"] == ["attention", "ffn"]
    assert "only last:1" in text and text.endswith(f"drawn: {tmp_path / 'out' / 'depth_probes.png'}")
    assert (tmp_path / "out" / "depth_probes.png").is_file()
