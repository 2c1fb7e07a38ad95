"""What a command is to the person at the terminal: flags, log lines, results, and errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags
from tqdm import tqdm

from moda_jax import command_help, config_files, other_names
from moda_jax.config import Config, check_local
from moda_jax.exit_codes import ExitCode, RunStoppedError
from moda_jax.parallel import peers
from moda_jax.parallel.roll_call import PeersMissingError
from moda_jax.training.run_config import with_run_config
from moda_jax.training.status_line import StatusLine

_LOGGERS = ("moda_jax", "pallas_kernels")
_PLACES = ("workdir", "output", "checkpoint", "tokenizer", "task-dir", "data")  # flags; data: NAME=PATH
_results: TextIO | None = None  # stdout, once it is kept for results

_DEBUG = flags.DEFINE_bool("debug", False, "show the traceback of an error, and every library's log lines")


class _LineSafeHandler(logging.Handler):
    """Writes log lines to stderr without tearing a status line, or tqdm's bar, apart."""

    def emit(self, record: logging.LogRecord) -> None:
        # A pipe that was closed, a terminal that is gone, a log file on a full disk: a run goes on without its log.
        with contextlib.suppress(OSError):
            StatusLine.hide_shown()
            tqdm.write(self.format(record), file=sys.stderr)


def run_command(
    main: Callable[[], ExitCode | None], own: flags.FlagValues | None = None, description: str | None = None
) -> None:
    """Runs a command-line program: parses the flags, sets up logging, calls main, and exits with an `ExitCode`.

    A mistake on the command line, and a run that cannot go on (`RunStoppedError`), end in one line on stderr; `--debug`
    shows the traceback too. While main runs, stdout belongs to `print_result` alone: what libraries print there goes to
    stderr. In a run of many processes the others are told of an end by an error.

    Args:
        main: called without arguments once the flags are parsed; it puts what can fail by the user's fault in
            `user_errors`. Returns the exit code; None: FINISHED.
        own: the command's own flags; None: those of absl's global `flags.FLAGS`, which are understood beside it.
        description: of the command, for `--help`; None: the docstring of the program.
    """
    values = flags.FLAGS if own is None else own
    if description is None:
        description = sys.modules["__main__"].__doc__ or ""

    def run(_: Sequence[str]) -> int:
        faulthandler.enable()  # a crash in native code says where
        _set_up_logging()
        _keep_stdout_for_results()
        _write_any_text(result_stream())
        try:
            return int(main() or ExitCode.FINISHED)
        except (RunStoppedError, PeersMissingError) as error:
            if _DEBUG.value:
                traceback.print_exc()
            lost = isinstance(error, PeersMissingError)
            code, reason = ExitCode.PEER_LOST if lost else ExitCode.CANNOT_GO_ON, str(error)
            _fail(reason)
        except BrokenPipeError:
            _forget_closed_streams()
            code = ExitCode.CANNOT_GO_ON
            reason = "the reader of the output closed it before all was written; what was to be saved is saved"
            _fail(reason)
        except KeyboardInterrupt:
            code, reason = ExitCode.INTERRUPTED, "interrupted; the same command resumes from the newest checkpoint"
            _fail(reason)
        except SystemExit as ended:  # from `user_errors`, which has said why
            if not isinstance(ended.code, int | None):
                _fail(str(ended.code))
            code, reason = ended.code, "its log says why"
            code = ExitCode.CANNOT_GO_ON if isinstance(code, str) else code or ExitCode.FINISHED
        except BaseException as error:
            group = peers.current()
            if group is None:
                raise
            group.await_verdict(error)
            traceback.print_exc()
            code, reason = ExitCode.CANNOT_GO_ON, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        group = peers.current()
        if group is not None and code not in (ExitCode.FINISHED, ExitCode.STOPPED):
            group.end(code, reason)
        return int(code)

    app.run(run, flags_parser=functools.partial(_parse_flags, values=values, description=description))


def print_result(text: object) -> None:
    """Prints what the command was asked for, on stdout, where nothing else is printed."""
    print(text, file=result_stream(), flush=True)


def result_stream() -> TextIO:
    """Where results go: stdout as the command was given it."""
    return _results or sys.stdout


def _keep_stdout_for_results() -> None:
    """Points the process's stdout, and Python's, to stderr: libraries print to both."""
    global _results
    try:
        kept = os.dup(1)
        sys.stdout.flush()
        os.dup2(2, 1)
    except (OSError, AttributeError):  # closed by whoever started the command
        return
    _results = os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    sys.stdout = sys.stderr


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Ends the process with one line and exit code 2 if the block raises what a bad config or a missing feature raises.

    Meant for a program's set-up: the same exceptions in the middle of a run are bugs, and keep their traceback.
    """
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        group = peers.current()
        if group is not None:  # collectives raise ValueErrors too when a peer has gone
            group.await_verdict(error)
        if _DEBUG.value:
            traceback.print_exc()
        _fail(str(error))
        sys.exit(int(ExitCode.USER_ERROR))


def config_from_flags(values: flags.FlagValues, flag: str = "config") -> tuple[Config, str]:
    """The validated config that a `config_flags.DEFINE_config_file` flag holds, and a name for it.

    Args:
        values: the command's own flags.
        flag: the flag's name.

    Returns:
        The config, and the file's name without ".py", with the argument appended: "moda_700m_row4".

    Raises:
        ValueError: no config file was named, or the config is not valid.
    """
    if values[flag].value is None:
        raise ValueError(f"--{flag}: missing; name a config file, as in --{flag}=configs/quickstart.py")
    path, _, argument = config_flags.get_config_filename(values[flag]).partition(":")
    name = f"{Path(path).stem}_{argument}" if argument else Path(path).stem
    return Config.from_dict(values[flag].value.to_dict()), name


def check_config_arguments(arguments: Sequence[str], flag: str = "config") -> None:
    """Checks that every `--config.section.key` names a field of `Config`.

    Args:
        arguments: the command line.
        flag: the name of the config flag.

    Raises:
        ValueError: an unknown section or key; the message names the nearest known ones.
    """
    sections, known = config_fields(Config)
    for argument in arguments:
        name = argument.split("=", 1)[0].lstrip("-").removeprefix("no")
        if not argument.startswith("-") or not name.startswith(f"{flag}."):
            continue
        path = name.removeprefix(f"{flag}.")
        if path in known:
            continue
        if path in sections:
            raise ValueError(f"--{flag}.{path}: is a section; set one of its keys, as in --{flag}.{path}.KEY=VALUE")
        meant = other_names.did_you_mean(path, known, other_names.FIELDS)
        section = next((name for name in _prefixes(path) if name in sections), None)
        others = [name for name in (*sections, *known) if name.rpartition(".")[0] == (section or "")]
        hint = f"did you mean --{flag}.{meant}?" if meant else f"known: {', '.join(others)}"
        raise ValueError(f"--{flag}.{path}: unknown config key; {hint}")


def config_fields(section: type, prefix: str = "") -> tuple[list[str], list[str]]:
    """The sections below a section and all that can be set in them: (["model", ...], ["model.width", ...]).

    Args:
        section: a config dataclass.
        prefix: stands before every name.
    """
    sections, keys = [], [f"{prefix}{alias}" for alias in getattr(section, "ALIASES", ())]
    for field in dataclasses.fields(section):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.default_factory):
            deeper_sections, deeper_keys = config_fields(field.default_factory, f"{name}.")
            sections += [name, *deeper_sections]
            keys += deeper_keys
        else:
            keys.append(name)
    return sections, keys


def _prefixes(path: str) -> list[str]:
    """What a dotted name lies in, the longest first: "a.b.c" -> ["a.b", "a"]."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def _parse_flags(arguments: Sequence[str], *, values: flags.FlagValues, description: str) -> Sequence[str]:
    """absl's parser, with one line for what it and ml_collections raise."""
    try:
        text = command_help.asked_for(arguments[1:], description, values)
        if text is not None:
            print(text)
            sys.exit(int(ExitCode.FINISHED))
        if "config" in values:
            config_files.make_importable()
            arguments = config_files.with_found_config(with_run_config(arguments))
        arguments = [arguments[0], *(_with_hyphens(argument, values) for argument in arguments[1:])]
        check_config_arguments(arguments[1:])
        own = [name for name in values if "." not in name]
        for name, flag in ((name, flags.FLAGS[name]) for name in flags.FLAGS):  # absl's, and `parallel.launch`'s
            if name not in values and name == flag.name:  # a flag with a short name stands under both
                values[name] = flag
        try:
            rest = values(arguments)
        except flags.UnrecognizedFlagError as error:
            raise ValueError(_unknown_flag(error.flagname, own)) from None
        flags.FLAGS.mark_as_parsed()
        _check_places(values)
        if len(rest) > 1:
            raise ValueError(f"{rest[1]!r}: unexpected argument; options are written --name=value")
        return rest
    except (ValueError, TypeError, AttributeError, KeyError, flags.Error) as error:
        # An error inside a config file reaches us with its whole traceback as text; the last line is what went wrong.
        lines = [line for line in str(error).splitlines() if line.strip()]
        if "--debug" in arguments:
            traceback.print_exc()
        _fail(lines[-1].removeprefix("ValueError: ") if lines else repr(error))
        sys.exit(int(ExitCode.USER_ERROR))


def _with_hyphens(argument: str, values: flags.FlagValues) -> str:
    """An argument with its flag as we spell it: with hyphens. Underscores are understood, as some flags had them."""
    dashes = argument[: len(argument) - len(argument.lstrip("-"))]
    name, equals, value = argument[len(dashes) :].partition("=")
    hyphens = name.replace("_", "-")
    known = hyphens in values or hyphens.removeprefix("no") in values
    return f"{dashes}{hyphens}{equals}{value}" if dashes and known else argument


def _unknown_flag(name: str, known: Sequence[str]) -> str:
    """What to say of a flag that a command does not have."""
    meant = other_names.did_you_mean(name.replace("_", "-"), known, other_names.FLAGS)
    if meant is None and "config" in known:
        field = other_names.did_you_mean(name.replace("-", "_"), config_fields(Config)[1], other_names.FIELDS)
        meant = None if field is None else f"config.{field}"
    hint = (
        f"did you mean --{meant}?"
        if meant
        else f"known: {', '.join(f'--{flag}' for flag in sorted(known))}; see --help"
    )
    return f"--{name}: unknown flag; {hint}"


def _check_places(values: flags.FlagValues) -> None:
    """Every flag that names a file or directory names a local one."""
    for name in _PLACES:
        value = values[name].value if name in values else None
        for place in value if isinstance(value, list) else [value or ""]:
            check_local(f"--{name}", place.partition("=")[2] if name == "data" else place)


def _set_up_logging() -> None:
    handler = _LineSafeHandler()
    handler.setFormatter(_Formatter())
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
    if not sys.stderr.isatty():
        _switch_off_bars()
    absl_logging.set_verbosity(absl_logging.INFO if _DEBUG.value else absl_logging.ERROR)


def _switch_off_bars() -> None:
    """Libraries' progress bars are carriage returns in a log file; ours are lines there, see `progress`."""
    start = tqdm.__init__

    @functools.wraps(start)
    def disabled(bar: tqdm, *arguments: object, **options: object) -> None:
        start(bar, *arguments, **options | {"disable": True})

    tqdm.__init__ = disabled


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"{time.strftime('%H:%M:%S')} {level}{record.getMessage()}"


def _write_any_text(stream: TextIO) -> None:
    """Lets a stream of a narrow encoding take any text: what it lacks is written as an escape."""
    try:
        "\N{REPLACEMENT CHARACTER}".encode(stream.encoding)
    except UnicodeEncodeError:
        stream.reconfigure(errors="backslashreplace")
        logging.getLogger("moda_jax").warning(
            "stdout takes %s only: other characters are written as escapes; set PYTHONIOENCODING=utf-8", stream.encoding
        )


def _forget_closed_streams() -> None:
    """Python flushes stdout and stderr at its end, and would complain once more of one that is closed."""
    for stream in (result_stream(), sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(message: str) -> None:
    with contextlib.suppress(OSError):  # of a stderr that is closed too
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
