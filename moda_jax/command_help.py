"""What the commands say of themselves: `--help`, and `--fields [SECTION]`: a config's fields and what they mean."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator, Sequence

from absl import flags

from moda_jax import config_files
from moda_jax.config import Config

_HELP = ("-h", "-help", "--help", "--helpshort", "-helpshort")
_WIDTH = 100  # columns
_ATTRIBUTE = re.compile(r"    (\w+(?:, \w+)*): (.*)")


def asked_for(arguments: Sequence[str], description: str, values: flags.FlagValues) -> str | None:
    """The text that a command line asks for instead of running the command; None: it asks for none.

    Args:
        arguments: the command line, without the program.
        description: of the command, printed first.
        values: the command's own flags.

    Raises:
        ValueError: `--fields` of a section that there is not.
    """
    if any(argument in _HELP for argument in arguments):
        return help_text(description, values)
    for i, argument in enumerate(arguments):
        name, equals, section = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "fields":
            following = arguments[i + 1] if i + 1 < len(arguments) else ""
            return fields_text(section if equals or following.startswith("-") else following)
    return None


def help_text(description: str, values: flags.FlagValues) -> str:
    """The command's description and its flags; of one that takes a config also our configs.

    Args:
        description: printed first.
        values: the command's own flags.
    """
    rows = [_flag_row(values[name]) for name in sorted(values)]
    rows.append(("--[no]debug (bool, default False)", "show the traceback of an error, and every library's log lines"))
    text = f"{description.strip()}\n\nFlags:\n\n{_listing(rows)}\n"
    if "config" in values:
        configs = f"Configs by name: {', '.join(config_files.names())}; or the path of a file of your own."
        text += f"\n{textwrap.fill(configs, _WIDTH)}\n"
        text += "--fields [SECTION] lists every --config.SECTION.KEY with its type, default and meaning.\n"
    return text


def _flag_row(flag: flags.Flag) -> tuple[str, str]:
    """How a flag is given, and what it means."""
    kind = {"config object": "file", "comma separated list of strings": "list"}.get(flag.flag_type(), flag.flag_type())
    choices = getattr(flag.parser, "enum_values", None)
    if choices:
        kind = " | ".join(choices)
    default = "" if flag.default in (None, []) else f", default {flag.default!r}"
    meaning = flag.help.partition(";\n    repeat this option")[0]  # what absl adds where a flag may be repeated
    return f"--{'[no]' if flag.boolean else ''}{flag.name} ({kind}{default})", meaning


def fields_text(section: str = "") -> str:
    """A line for every field: name, type, default, and below it the meaning.

    Args:
        section: "model", "model.moda"; "" for all.

    Raises:
        ValueError: no such section.
    """
    rows = [row for row in _rows(Config) if not section or row[0].startswith(f"{section}.")]
    if not rows:
        known = dict.fromkeys(name.rpartition(".")[0] for name, *_ in _rows(Config))
        raise ValueError(f"--fields={section}: no such section; known: {', '.join(known)}")
    return _listing((f"--config.{name} ({kind}, default {default})", meaning) for name, kind, default, meaning in rows)


def _listing(rows: Iterable[tuple[str, str]]) -> str:
    """A line for each, and its meaning below it."""
    indent = " " * 4
    return "\n".join(
        f"{title}\n{textwrap.fill(meaning, _WIDTH, initial_indent=indent, subsequent_indent=indent)}"
        for title, meaning in rows
    )


def _rows(section: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default, meaning) of every field below a section; its own before those of sections in it."""
    meanings, types = _meanings(section), typing.get_type_hints(section)
    for field in sorted(dataclasses.fields(section), key=lambda field: dataclasses.is_dataclass(field.default_factory)):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.default_factory):
            yield from _rows(field.default_factory, f"{name}.")
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        kind = types[field.name]
        yield name, kind.__name__ if isinstance(kind, type) else str(kind), repr(default), meanings[field.name]


def _meanings(section: type) -> dict[str, str]:
    """What the docstrings of a section and its bases say of its fields."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        names: list[str] = []
        for line in inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2].splitlines():
            match = _ATTRIBUTE.fullmatch(line)
            if match:
                names = match[1].split(", ")
                found |= dict.fromkeys(names, match[2])
            elif names and line.startswith(" " * 8):
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
            else:
                names = []
    return found
