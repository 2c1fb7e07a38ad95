import io
import logging

from tqdm import tqdm

from moda_jax import progress
from moda_jax.progress import ProgressLines, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    assert isinstance(progress_bar(total=3, disable=True), tqdm)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(progress_bar(total=3), ProgressLines)


def test_a_line_now_and_then(monkeypatch, caplog):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO, logger="moda_jax"), ProgressLines(total=8, desc="Reading", unit=" files") as bar:
        for i in range(8):
            bar.set_postfix_str(f"file {i}")
            bar.update()
    assert caplog.messages == [
        "Reading: 3 of 8 files, 50 s left (file 2)", "Reading: 6 of 8 files, 20 s left (file 5)",
    ]  # fmt: skip


def test_what_is_gone_through_comes_out(caplog):
    bar = ProgressLines("abc", desc="Reading")
    assert (list(bar), bar.n, bar.total) == (["a", "b", "c"], 3, 3)
    assert list(ProgressLines(iter("ab"))) == ["a", "b"]
    assert caplog.messages == []
