"""Every field of a run, with its default. What a field means stands beside it in `moda_jax/config.py`.

Any field can be set on the command line: `--config=configs/quickstart.py --config.train.num_steps=1000`.
"""

import dataclasses
import types
import typing

from ml_collections import ConfigDict, config_dict

from moda_jax.config import Config


def get_config() -> ConfigDict:
    """The dataclasses' defaults as a ConfigDict; one that may be None is a typed placeholder."""
    return ConfigDict({field.name: _section(field.default_factory) for field in dataclasses.fields(Config)})


def _section(section: type) -> dict[str, typing.Any]:
    hints = typing.get_type_hints(section)
    values = {}
    for field in dataclasses.fields(section):
        nested = dataclasses.is_dataclass(field.default_factory)
        values[field.name] = _section(field.default_factory) if nested else _default(field.default, hints[field.name])
    # Other names of a field, unset: an older config file may set them.
    return values | {alias: config_dict.placeholder(bool) for alias in getattr(section, "ALIASES", ())}


def _default(value: typing.Any, hint: typing.Any) -> typing.Any:
    if not isinstance(hint, types.UnionType):
        return value
    (kind,) = (kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    placeholder = config_dict.placeholder(kind)
    placeholder.set(value)
    return placeholder
