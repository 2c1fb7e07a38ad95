"""Finds a task by what `train.task` says."""

from __future__ import annotations

from moda_jax.class_path import find_class
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
    return find_class("train.task", name, TASKS, Task)


def make_task(config: Config) -> Task:
    """The task of a run's config.

    Raises:
        ValueError: see `find_task`.
    """
    return find_task(config.train.task)(config)
