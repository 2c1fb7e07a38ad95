import contextlib
import io
import logging
import os
import pty
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags
from support.documents import REPOSITORY, start_python

from moda_jax.quantities import duration, quantity
from moda_jax.training import console
from moda_jax.training.console import (
    _LineSafeHandler,
    check_config_arguments,
    user_errors,
)
from moda_jax.training.status_line import StatusLine


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.model.num_layer=3", r"num_layer: unknown config key; did you mean --config\.model\.num_layers\?"),
        ("--config.modle.num_layers=3", r"did you mean --config\.model\.num_layers"),
        ("--config.model.mhc.stream=3", r"did you mean --config\.model\.mhc\.streams\?"),
        ("--config.model.mhc.zzzzzzz=3", r"known: model\.mhc\.streams, model\.mhc\.sinkhorn_rounds$"),
        ("--config.model.mhc=3", r"--config\.model\.mhc: is a section; set one of its keys"),
        ("--config.eval.zzzzzzz=3", r"unknown config key; known: eval\.interval_steps, eval\.num_batches"),
        ("--config.zzzzzzz=3", r"unknown config key; known: model, data, optimizer"),
        ("--noconfig.model.qk=1", r"--config\.model\.qk: unknown config key"),
        ("--config.model=3", r"--config\.model: is a section; set one of its keys"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(argument, message):
    with pytest.raises(ValueError, match=message):
        check_config_arguments([argument])


def test_good_arguments_pass():
    check_config_arguments(
        [f"--config={__file__}:row1", "--config.model.num_layers=3", "--noconfig.model.qk_norm", "--workdir=x"]
    )
    check_config_arguments(["--config.model.mhc.streams=3", "--config.model.depth_ffn_kv=false"])
    check_config_arguments(["--config", __file__, "--config.data.cache_dir", "config.nothing"])


def test_user_errors_end_in_one_line(capsys):
    import absl.flags

    if not absl.flags.FLAGS.is_parsed():
        absl.flags.FLAGS(["test"])
    with pytest.raises(SystemExit) as ended, user_errors():
        raise ValueError("model.width=-1: expected a positive number")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: model.width=-1: expected a positive number\n"
    with pytest.raises(KeyError), user_errors():
        raise KeyError("a bug keeps its traceback")


def test_the_progress_line_is_overwritten_on_a_terminal():
    reader, writer = pty.openpty()  # of size 0 x 0, as some terminals say that they are
    with os.fdopen(reader, "rb", buffering=0) as reader, os.fdopen(writer, "w") as stream:
        line = StatusLine(logging.getLogger("moda_jax.test"), stream)
        line.show("step 1", milestone=True)
        line.show("step 2", milestone=True)  # at once: not drawn
        StatusLine.hide_shown()
        line.show("step 3 " + 100 * "x", milestone=False)
        line.close()
        StatusLine.hide_shown()
        expected = "\r\x1b[Kstep 1" + "\r\x1b[K" + "\r\x1b[Kstep 3 " + 72 * "x" + "\r\x1b[K"
        shown = b""
        while len(shown) < len(expected):  # a busy machine hands it over in parts
            shown += reader.read(1000)
        assert shown.decode() == expected


def test_without_a_terminal_milestones_are_logged(caplog):
    stream = io.StringIO()
    line = StatusLine(logging.getLogger("moda_jax.test"), stream)
    with caplog.at_level(logging.INFO, logger="moda_jax"):
        line.show("step 1", milestone=False)
        line.show("step 2", milestone=True)
        line.close()
    assert caplog.messages == ["step 2"]
    assert stream.getvalue() == ""


def test_numbers_for_people():
    assert [duration(s) for s in (0.4, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]
    assert [quantity(n) for n in (950, 12345, 4.56e6, 1.2e9)] == ["950", "12.3k", "4.56M", "1.20B"]


STOPPED = """
from moda_jax.training.console import run_command
from moda_jax.exit_codes import RunStoppedError

def main():
    raise RunStoppedError("runs/x: step 7: no further")

run_command(main)
"""


def test_a_run_that_cannot_go_on_ends_in_one_line():
    process = start_python(STOPPED)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, "error: runs/x: step 7: no further\n")


TALKING = """
import os, sys, time
from tqdm import tqdm
from moda_jax.progress import progress_bar
from moda_jax.training.console import print_result, run_command

def main():
    print("a library's line")
    os.write(1, b"a native library's line\\n")
    for _ in tqdm(range(3), disable=False):
        pass
    for _ in progress_bar(range(3), desc="ours"):
        pass
    print_result("the result")
    return 75

run_command(main)
"""


TOY = """
import sys
from absl import flags
sys.argv = ["toy"]
from moda_jax.training.console import print_result, run_command
def main():
    {main}
run_command(main)
"""


def test_stdout_holds_results_only_and_log_files_hold_lines_only():
    process = start_python(TALKING)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, "the result\n"), errors
    assert sorted(errors.splitlines()) == ["a library's line", "a native library's line"]
    assert "\r" not in errors


def test_a_remote_place_is_refused_in_every_command():
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_multi_string("data", [], "", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "", flag_values=values)
    values(["x", "--workdir=runs/a", "--data=wiki=wiki.txt", "--prompt=s3://bucket"])
    console._check_places(values)
    for argument in ("--workdir=gs://b/run", "--data=wiki=s3://b/wiki.txt"):
        values(["x", argument])
        with pytest.raises(ValueError, match=rf"^--{argument[2:6]}\w*='\w+://.*': is remote"):
            console._check_places(values)
        values.unparse_flags()
        values["workdir"].value = None


OWN_FLAGS = """
import sys
from absl import flags
from ml_collections import config_flags
from moda_jax.training.console import print_result, run_command

FLAGS = flags.FlagValues()
MOST = flags.DEFINE_integer("max-tokens", 200, "Tokens.", flag_values=FLAGS)
LOUD = flags.DEFINE_bool("be-loud", True, "Loud.", flag_values=FLAGS)
config_flags.DEFINE_config_file("config", None, "", flag_values=FLAGS)
run_command(lambda: print_result((MOST.value, LOUD.value)), FLAGS, "It does nothing.")
"""


def own_flags(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", OWN_FLAGS, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_flags_have_hyphens_and_underscores_are_understood():
    assert own_flags("--max-tokens=3", "--nobe-loud") == (0, "(3, False)\n")
    assert own_flags("--max_tokens", "4", "--nobe_loud") == (0, "(4, False)\n")


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--max_new_tokens=3", "--max_new_tokens: unknown flag; did you mean --max-tokens?"),
        ("--max-token=3", "--max-token: unknown flag; did you mean --max-tokens?"),
        ("--lr=3", "--lr: unknown flag; did you mean --config.optimizer.learning_rate?"),
        ("--zzz", "--zzz: unknown flag; known: --be-loud, --config, --max-tokens; see --help"),
    ],
)
def test_an_unknown_flag_is_answered_with_the_one_that_is_meant(argument, line, capsys):
    values = flags.FlagValues()
    flags.DEFINE_integer("max-tokens", 200, "", flag_values=values)
    flags.DEFINE_bool("be-loud", True, "", flag_values=values)
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    with pytest.raises(SystemExit) as ended:
        console._parse_flags(["x", argument], values=values, description="")
    assert (ended.value.code, capsys.readouterr().err) == (2, f"error: {line}\n")


def run_toy(main, **streams):
    """A program of ours whose main is the given line."""
    return subprocess.run(
        [sys.executable, "-c", TOY.format(main=main)], cwd=REPOSITORY, stderr=subprocess.PIPE, timeout=120, check=False,
        **{"stdout": subprocess.PIPE} | streams,
    )  # fmt: skip


def test_an_ascii_stdout_takes_any_text_and_says_how():
    done = run_toy("print_result('± naïve 日')", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, b"\\xb1 na\\xefve \\u65e5\n")
    assert b"stdout takes ascii only: other characters are written as escapes; set PYTHONIO" in done.stderr
    done = run_toy("print_result('± naïve')", env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, "± naïve\n", b"")


def test_a_closed_pipe_ends_in_one_line():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run_toy("[print_result('x' * 1000) for _ in range(1000)]", stdout=writer)
    finally:
        os.close(writer)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == [
        "error: the reader of the output closed it before all was written; what was to be saved is saved"
    ]


def test_a_run_goes_on_without_its_log(monkeypatch):
    """stderr may be a pipe whose reader is gone, or a file on a full disk."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as closed:
        monkeypatch.setattr("sys.stderr", closed)
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"x")  # nothing gets through
        handler = _LineSafeHandler()
        handler.emit(logging.makeLogRecord({"msg": "lost"}))
        with contextlib.suppress(BrokenPipeError):
            closed.close()
