"""An exponential moving average of the parameters, kept in the optimizer's state.

Behind update n, counted from 1:

    average = d average + (1 - d) parameters,    d = min(decay, (1 + n) / (10 + n))

It starts as the parameters do; the second term lets a short run forget that start. Where it stands it is saved,
restored, split over a mesh and left alone by a skipped step as the optimizer's moments are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any

AVERAGE_PREFIX = "ema_"  # of the metrics of averaged weights


class AveragedParams(NamedTuple):
    """The state of `averaging`.

    Attributes:
        count: int32 scalar, updates so far.
        average: like the parameters.
    """

    count: jax.Array
    average: PyTree


def averaging(decay: float) -> optax.GradientTransformation:
    """The last link of an optimizer's chain: passes the updates on, and averages what the parameters become.

    Args:
        decay: see above, in (0, 1).
    """

    def init(params: PyTree) -> AveragedParams:
        return AveragedParams(jnp.zeros((), jnp.int32), params)

    def update(updates: PyTree, state: AveragedParams, params: PyTree = None) -> tuple[PyTree, AveragedParams]:
        count = state.count + 1
        n = count.astype(jnp.float32)
        share = 1.0 - jnp.minimum(decay, (1.0 + n) / (10.0 + n))
        moved = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: a + share * (p - a), state.average, moved)
        return updates, AveragedParams(count, average)

    return optax.GradientTransformation(init, update)


def averaged_params(optimizer_state: PyTree) -> PyTree | None:
    """The average in an optimizer's state; None where there is none."""
    found = [leaf for leaf in jax.tree.leaves(optimizer_state, is_leaf=_is_average) if _is_average(leaf)]
    return found[0].average if found else None


def restarted_average(optimizer_state: PyTree, params: PyTree) -> PyTree:
    """The state with an average, if there is one, that starts from these parameters."""
    return jax.tree.map(
        lambda leaf: AveragedParams(jnp.zeros_like(leaf.count), jax.tree.map(jnp.copy, params))
        if _is_average(leaf) else leaf,
        optimizer_state, is_leaf=_is_average,
    )  # fmt: skip


def _is_average(leaf: Any) -> bool:
    return isinstance(leaf, AveragedParams)
