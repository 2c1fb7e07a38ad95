"""What the commands say of themselves: `--help`, and `--fields [SECTION]`: a config's fields and what they mean."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence

from absl import flags

from moda_jax import config_files
from moda_jax.config import Config

_HELP = ("-h", "-help", "--help", "--helpshort", "-helpshort")
_WIDTH = 100  # columns
_ATTRIBUTE = re.compile(r"    (\w+(?:, \w+)*): (.*)")


def asked_for(arguments: Sequence[str], description: str) -> str | None:
    """The text that a command line asks for instead of running the command; None: it asks for none.

    Args:
        arguments: the command line, without the program.
        description: of the command, printed first.

    Raises:
        ValueError: `--fields` of a section that there is not.
    """
    if any(argument in _HELP for argument in arguments):
        return help_text(description)
    for i, argument in enumerate(arguments):
        name, equals, section = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "fields":
            following = arguments[i + 1] if i + 1 < len(arguments) else ""
            return fields_text(section if equals or following.startswith("-") else following)
    return None


def help_text(description: str) -> str:
    """The command's description and its flags; of one that takes a config also our configs."""
    text = f"{description.strip()}\n\nFlags:\n{flags.FLAGS.main_module_help()}\n"
    text += "\n  --[no]debug: show the traceback of an error, and every library's log lines\n    (default: 'false')\n"
    if "config" in flags.FLAGS:
        text += f"\nConfigs by name: {', '.join(config_files.names())}; or the path of a file of your own.\n"
        text += "--fields [SECTION] lists every --config.SECTION.KEY with its type, default and meaning.\n"
    return text


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
    indent = " " * 4
    return "\n".join(
        f"--config.{name} ({kind}, default {default})\n"
        + textwrap.fill(meaning, _WIDTH, initial_indent=indent, subsequent_indent=indent)
        for name, kind, default, meaning in rows
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
