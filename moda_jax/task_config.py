"""The registry of tasks: `train.task`."""

from __future__ import annotations

# Name -> "module:Class", a `moda_jax.tasks.task.Task`. `train.task` may also be such a path.
TASKS = {
    "language": "moda_jax.tasks.language:LanguageModelling",
    "vision": "moda_jax.tasks.vision:Vision",
}
