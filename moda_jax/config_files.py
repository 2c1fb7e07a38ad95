"""Where config files are found: at a path, or by the name of one of ours, in a clone or in an installed package.

In a clone our files are the folder `configs` at the top level, the package that they import one another from. A wheel
holds them inside of `moda_jax`, so that no other package in site-packages can have that name. Config files, ours and
everybody's, say `from configs import base` in both.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

_PACKAGE = Path(__file__).parent


def directory() -> Path:
    """The folder of our config files."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """Our config files' names, as `--config=NAME` takes them."""
    return sorted(path.stem for path in directory().glob("*.py") if path.stem != "__init__")


def find(value: str) -> str:
    """The path, and argument, that `--config=VALUE` means.

    Args:
        value: "PATH.py", or the name of one of our files, "NAME" or "configs/NAME.py"; ":ARGUMENT" may follow.

    Raises:
        ValueError: there is no such file.
    """
    place, colon, argument = value.partition(":")
    path = Path(place)
    if path.is_file():
        return value
    ours = directory() / f"{path.stem}.py"
    if place in (path.stem, f"configs/{path.stem}.py") and path.stem in names():
        return f"{ours}{colon}{argument}"
    raise ValueError(f"{place}: no such file; ours by name: {', '.join(names())}")


def with_found_config(arguments: Sequence[str], flag: str = "config") -> list[str]:
    """The command line, with the config flag's value as a path.

    Args:
        arguments: the program and its arguments.
        flag: the flag's name.

    Raises:
        ValueError: there is no such file; the message begins with the flag.
    """
    found = list(arguments)
    for i, (argument, following) in enumerate(itertools.zip_longest(arguments, arguments[1:], fillvalue="")):
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or name != flag:
            continue
        try:
            if equals:
                found[i] = f"--{flag}={find(value)}"
            elif following:
                found[i + 1] = find(following)
        except ValueError as error:
            raise ValueError(f"--{flag}={error}") from None
    return found


def make_importable() -> None:
    """Lets config files import ours as `configs`, wherever they lie.

    A package or folder of that name that is another's stays importable beside ours.
    """
    ours = directory()
    found = importlib.util.find_spec("configs")
    places = [] if found is None else list(found.submodule_search_locations or ())
    if any(Path(place).resolve() == ours.resolve() for place in places):
        return
    spec = importlib.util.spec_from_file_location(
        "configs", ours / "__init__.py", submodule_search_locations=[str(ours), *places]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["configs"] = package
    spec.loader.exec_module(package)
