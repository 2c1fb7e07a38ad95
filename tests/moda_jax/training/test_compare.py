import dataclasses
import json

import matplotlib
import numpy as np
import pytest
from support.drawn import keep_figures, legend_texts

from moda_jax import pictures
from moda_jax.config import Config
from moda_jax.training import compare
from moda_jax.training.compare import main
from moda_jax.training.workdir import write_config


def write(workdir, steps, config=None, shift=0.0):
    workdir.mkdir(parents=True)
    lines = [
        {"step": n, "loss": 1 / n + shift} | ({"validation_loss": 2.0 + shift + (n > 4)} if n % 2 == 0 else {})
        for n in range(1, steps + 1)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config is not None:
        write_config(workdir, config, [])


def seeded(seed, learning_rate=1e-3, tokenizer="bytes"):
    config = Config()
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, seed=seed),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=learning_rate),
        data=dataclasses.replace(config.data, tokenizer=tokenizer),
    )


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, kept after they are written."""
    return keep_figures(monkeypatch, compare)


def test_runs_are_compared_on_one_plot_with_a_table(tmp_path, capsys):
    write(tmp_path / "a/run", 3)
    write(tmp_path / "b/run", 6)
    output = tmp_path / "both.png"
    assert main(["compare", str(tmp_path / "a/run"), str(tmp_path / "b/run"), f"--output={output}"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:4] == ["run", "step", "tokens", "loss"]
    assert rows[0][-4:] == ["best", "at_step", "learning_rate", "seed"]
    # The last validation was a step before; no config says learning rate and seed.
    assert rows[1] == ["a/run", "3", "-", "0.3333", "2.0000", "-", "-", "2.0000", "2", "-", "-"]
    assert rows[2] == ["b/run", "6", "-", "0.1667", "3.0000", "-", "-", "2.0000", "2", "-", "-"]
    assert output.read_bytes().startswith(b"\x89PNG")


def test_seeds_of_an_arm_have_a_mean_in_table_and_picture(tmp_path, drawn):
    write(tmp_path / "a0", 8, seeded(0))
    write(tmp_path / "b0", 8, seeded(0, learning_rate=3e-4))
    write(tmp_path / "a1", 8, seeded(1), shift=0.5)
    text = compare.compare_runs([tmp_path / name for name in ("a0", "b0", "a1")], tmp_path / "c.png")
    rows = {line[:15].strip(): line[15:].split() for line in text.splitlines()[1:]}
    assert list(rows) == ["a0", "a1", "mean of 2 seeds", "b0"]
    assert rows["a1"][-4:] == ["2.5000", "2", "0.001", "1"] and rows["b0"][-2:] == ["0.0003", "0"]
    assert rows["mean of 2 seeds"] == ["8", "-", "0.3750", "3.2500", "-", "-", "2.2500", "-", "0.001", "-"]
    curves, gaps = drawn[0].axes
    labels = legend_texts(drawn[0])
    assert labels == ["mean of 2 seeds: a0, a1", "b0"]
    mean, other = (next(line for line in curves.lines if line.get_label() == label) for label in labels)
    np.testing.assert_allclose(mean.get_ydata(), pictures.smooth([1 / n + 0.25 for n in range(1, 9)]))
    assert mean.get_linestyle() != other.get_linestyle() and mean.get_color() != other.get_color()
    (gap,) = [line for line in gaps.lines if line.get_label() == "b0"]
    np.testing.assert_allclose(gap.get_ydata(), -0.25)
    assert all(axes.get_title("left") and axes.get_legend() is None for axes in drawn[0].axes)
    assert curves.get_ylabel() == "loss (nats per byte)"


def test_losses_of_two_units_are_not_put_side_by_side(tmp_path):
    write(tmp_path / "bytes", 3, seeded(0))
    write(tmp_path / "pieces", 3, seeded(0, tokenizer="tokenizer.json"))
    with pytest.raises(
        ValueError, match=r"compare: bytes: loss \(nats per byte\), pieces: loss \(nats per token\); expected"
    ):
        compare.compare_runs([tmp_path / "bytes", tmp_path / "pieces"], tmp_path / "c.png")


def test_a_picture_of_one_run_has_one_panel(tmp_path, drawn):
    write(tmp_path / "a", 3)
    compare.compare_runs([tmp_path / "a"], tmp_path / "c.png")
    assert len(drawn[0].axes) == 1 and matplotlib.image.imread(tmp_path / "c.png").shape[1] == 880


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "error: none: no such directory; expected the directory of a run"),
        (["."], r"error: .: holds no metrics.jsonl with a line"),
        ([".", "."], "error: compare: a run is given twice"),
        ([".", "--output=none/a.png"], "error: --output=none/a.png: there is no directory none"),
    ],
)
def test_a_comparison_that_cannot_be_made_says_why(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    assert capsys.readouterr().err.startswith(message)
