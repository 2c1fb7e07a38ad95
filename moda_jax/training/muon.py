"""Muon: steepest descent of a matrix under the spectral norm, with momentum.

For a gradient matrix G of update n, with momentum beta and Nesterov's look ahead,

    M   <- beta M + (1 - beta) G
    M^  =  beta M / (1 - beta^(n+1)) + (1 - beta) G / (1 - beta^n)
    X   =  M^ / |M^|_F,  then 5 times  X <- a X + (b A + c A A) X  with A = X X^T      (Newton and Schulz)
    U   =  X * update_rms * sqrt(max(inputs, outputs))

and W <- W - learning_rate * (U + weight_decay W). All singular values of X come near 1, so it has rank min(inputs,
outputs) and a root mean square of about 1 / sqrt(max(inputs, outputs)). The iteration is Optax's; here is which axes of
a kernel are its inputs and outputs, and that constants are no part of the state.

Of a stack of layers every layer is a matrix of its own, and so are the keys and the values of one projection; the heads
of a projection are columns of one matrix. On a mesh momentum and products are split as the parameters are.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import optax
from optax import contrib

from moda_jax.config import MuonConfig
from moda_jax.parameter import ParameterKind, ParameterKinds

Array = jax.Array

_BATCH_AXES = ("layers", "pair")  # logical axes along which matrices are stacked
_PRECISION = "tensorfloat32"  # the iteration forgives rounding: others run it in bfloat16


class MuonState(NamedTuple):
    """What Muon keeps.

    Attributes:
        count: int32 scalar, updates done.
        mu: the momentum M, of the matrices.
    """

    count: Array
    mu: Any


def is_matrix(kind: ParameterKind) -> bool:
    """Whether a parameter is a matrix between activations: from the residual stream to heads or FFN channels, or back.

    It decays, one side of it is the width, and every axis has a name. Not so the embedding and the output projection,
    whose rows belong to one token each, nor a depth mechanism's maps to a handful of weights.
    """
    return (
        kind.decays
        and len(kind.axes) > 1
        and None not in kind.axes
        and "vocabulary" not in kind.axes
        and "width" in (kind.axes[0], kind.axes[-1])
    )


def muon(config: MuonConfig, kinds: ParameterKinds) -> optax.GradientTransformation:
    """The update U of every matrix; weight decay and learning rate come behind it.

    Args:
        config: its section.
        kinds: what the parameters are. All that are given must be matrices, see `is_matrix`.
    """

    def dimensions(params: Any) -> Any:
        return kinds.map(lambda kind, leaf: _dimensions(kind, leaf.ndim), params)

    orthogonal = contrib.scale_by_muon(
        ns_steps=config.newton_schulz_steps, beta=config.momentum, nesterov=True, weight_dimension_numbers=dimensions
    )

    def scaled(path: tuple, update: Array) -> Array:
        inputs, outputs = _sizes(kinds.find(path), update)
        if config.update_rms is None:
            return update * math.sqrt(max(1.0, outputs / inputs))
        return update * (config.update_rms * math.sqrt(max(inputs, outputs)))

    def init(params: Any) -> MuonState:
        state = orthogonal.init(params)
        return MuonState(state.count, state.mu)

    def update(updates: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        coefficients = orthogonal.init(()).ns_coeffs
        with jax.default_matmul_precision(_PRECISION):
            updates, new = orthogonal.update(updates, contrib.MuonState(*state, coefficients), params)
        return jax.tree.map_with_path(scaled, updates), MuonState(new.count, new.mu)

    return optax.GradientTransformation(init, update)


def _dimensions(kind: ParameterKind, ndim: int) -> contrib.MuonDimensionNumbers:
    """Which axes of a kernel are summed over, and which are outputs."""
    axes = kind.stacked_axes(ndim)
    sides = [i for i, axis in enumerate(axes) if axis not in _BATCH_AXES]
    split = 1 if axes[sides[0]] == "width" else len(sides) - 1
    return contrib.MuonDimensionNumbers(tuple(sides[:split]), tuple(sides[split:]))


def _sizes(kind: ParameterKind, array: Array) -> tuple[int, int]:
    """Inputs and outputs of one matrix."""
    dimensions = _dimensions(kind, array.ndim)
    inputs, outputs = (
        math.prod(array.shape[axis] for axis in axes) for axes in (dimensions.reduction_axis, dimensions.output_axis)
    )
    return inputs, outputs
