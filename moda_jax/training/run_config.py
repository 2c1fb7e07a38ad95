"""A run's own config.json as a config file for `--config=PATH:WORKDIR`: how `--workdir=RUN --config.train.num_steps=N`
is read, with the same checks as any config file."""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from moda_jax.config import Config
from moda_jax.training.workdir import CONFIG_FILE, read_config


def get_config(workdir: str) -> ConfigDict:
    """The config of the run in `workdir`.

    Raises:
        ValueError: it holds none, or not one of this version.
    """
    config = read_config(Path(workdir))
    if config is None:
        raise ValueError(f"--workdir={workdir}: holds no {CONFIG_FILE}")
    return as_config_dict(config)


def as_config_dict(config: Config) -> ConfigDict:
    """Every field of a config; one that may be None is a typed placeholder."""
    return ConfigDict({field.name: _section(getattr(config, field.name)) for field in dataclasses.fields(config)})


def with_run_config(arguments: Sequence[str]) -> list[str]:
    """The command line, with `--config` pointing to the run's own config where it has only `--workdir` of a run.

    Args:
        arguments: the program and its arguments.
    """
    arguments = list(arguments)
    workdir = None
    for argument, following in itertools.zip_longest(arguments[1:], arguments[2:], fillvalue=""):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            return arguments
        if argument.startswith("-") and name == "workdir":
            workdir = value if equals else following
    if workdir and (Path(workdir) / CONFIG_FILE).is_file():
        arguments.insert(1, f"--config={__file__}:{workdir}")
    return arguments


def _section(section: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(type(section))
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    values = {
        name: _section(value) if dataclasses.is_dataclass(value) else _typed(value, hints[name])
        for name, value in values.items()
    }
    # Other names of a field, unset: an older config file may set them.
    return values | {alias: config_dict.placeholder(bool) for alias in getattr(section, "ALIASES", ())}


def _typed(value: Any, hint: Any) -> Any:
    if not isinstance(hint, types.UnionType):
        return value
    (kind,) = (kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    placeholder = config_dict.placeholder(kind)
    placeholder.set(value)
    return placeholder
