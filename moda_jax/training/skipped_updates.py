"""Steps whose loss or gradient is not finite: passed over inside the jitted step, counted, and in the end named.

A skipped step changes no parameter, no moment of the optimizer and not its count of updates, on which the schedule
depends; the step number and the data go on. When more steps in a row are skipped than the config allows, all later ones
change nothing either, so the host, which reads a step late, finds the state as the fault met it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpdateCounts:
    """What became of the steps so far; int32 scalars, step = updates + skipped.

    Attributes:
        updates: steps that changed the parameters; the schedule counts by them.
        skipped: steps that did not.
        skipped_in_a_row: skipped ones since the last update.
    """

    updates: Array
    skipped: Array
    skipped_in_a_row: Array

    @classmethod
    def zero(cls) -> UpdateCounts:
        """Of a run that has not begun."""
        return cls(*(jnp.zeros((), jnp.int32) for _ in range(3)))


def choose_update(is_finite: Array, counts: UpdateCounts, new: Any, old: Any, limit: int) -> tuple[Any, UpdateCounts]:
    """`new` where the step was sound, `old` where it was not, and the counts after it. Traceable.

    Args:
        is_finite: bool scalar, of the step's loss and gradient.
        counts: before the step.
        new, old: equal pytrees of arrays.
        limit: `train.max_skipped_in_a_row`; once more than that were skipped, it is `old` for ever.
    """
    halted = counts.skipped_in_a_row > limit
    applied = is_finite & ~halted
    tree = jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, old)
    one = applied.astype(jnp.int32)
    in_a_row = jnp.where(applied, 0, counts.skipped_in_a_row + 1)
    return tree, UpdateCounts(counts.updates + one, counts.skipped + 1 - one, in_a_row)
