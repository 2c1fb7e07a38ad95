import json

import pytest

from moda_jax.training.compare import main


def write(workdir, steps):
    workdir.mkdir(parents=True)
    lines = [{"step": n, "loss": 1 / n} | ({"validation_loss": 2.0} if n % 2 == 0 else {}) for n in range(1, steps + 1)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs_are_compared_on_one_plot_with_a_table(tmp_path, capsys):
    write(tmp_path / "a/run", 3)
    write(tmp_path / "b/run", 5)
    output = tmp_path / "both.png"
    assert main(["compare", str(tmp_path / "a/run"), str(tmp_path / "b/run"), f"--output={output}"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:4] == ["run", "step", "tokens", "loss"]
    assert rows[1] == ["a/run", "3", "-", "0.3333", "2.0000", "-", "-"]  # the last validation was a step before
    assert rows[2][:4] == ["b/run", "5", "-", "0.2000"]
    assert output.read_bytes().startswith(b"\x89PNG")


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
