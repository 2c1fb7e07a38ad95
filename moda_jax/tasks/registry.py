"""Finds a task by what `train.task` says."""

from __future__ import annotations

import importlib

from moda_jax.config import Config
from moda_jax.task_config import TASKS
from moda_jax.tasks.task import Task


def find_task(name: str) -> type[Task]:
    """The class that `train.task` names.

    Args:
        name: one of `TASKS`, or "package.module:Class".

    Raises:
        ValueError: there is no such class, or it is no `Task`.
    """
    module_name, _, class_name = TASKS.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"train.task={name!r}: cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f"train.task={name!r}: expected a subclass of Task, got {found!r}")
    return found


def make_task(config: Config) -> Task:
    """The task of a run's config.

    Raises:
        ValueError: see `find_task`.
    """
    return find_task(config.train.task)(config)
