"""Parameters say what they are, where they are born: their logical axes, whether they decay, and what they compute in.

`parameter` makes a Flax parameter that carries its `ParameterKind`. A model's `ParameterKinds` are read where it is
made, so that its arrays may travel alone afterwards, in dicts or in somebody's variables: sharding, the gather of a
layer, the optimizer and the casts ask them by name.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True)
class ParameterKind:
    """What a parameter is.

    Attributes:
        axes: logical axes of its dimensions, see `moda_jax.parallel.mesh.RULES`; None: never split. Stacked layers have
            "layers" in front.
        decays: weight decay acts on it.
        is_cast: a matrix that is read in the compute dtype; else it is read in float32.
    """

    axes: tuple[str | None, ...]
    decays: bool = False
    is_cast: bool = False

    def stacked_axes(self, ndim: int) -> tuple[str | None, ...] | None:
        """The axes of an array of this rank: the parameter, or a stack of layers; None: it is neither."""
        return {0: self.axes, 1: ("layers", *self.axes)}.get(ndim - len(self.axes))


class _BareInLinen:
    """Tells `nnx.bridge` that in a Linen model the parameter is its array, as one without metadata is."""

    @staticmethod
    def from_nnx_metadata(metadata: dict[str, Any]) -> Array:
        return metadata["value"]


def parameter(value: Array, *axes: str | None, decays: bool = False, is_cast: bool = False) -> nnx.Param:
    """A parameter that says what it is; arguments as in `ParameterKind`.

    Args:
        value: at the start, float32.
        *axes: a logical axis for every dimension.
        decays, is_cast: by default it is no matrix: a scale, a vector, an offset or a gate.

    Raises:
        ValueError: other than one axis for each dimension.
    """
    if len(axes) != value.ndim:
        raise ValueError(f"axes={axes}: expected one for each dimension of a parameter of shape {value.shape}")
    return nnx.Param(value, kind=ParameterKind(axes, decays, is_cast), linen_meta_type=_BareInLinen)


@dataclasses.dataclass(frozen=True)
class ParameterKinds:
    """The kinds of a module's parameters, by name. Hashable.

    Attributes:
        entries: (dotted name, kind) pairs.
    """

    entries: tuple[tuple[str, ParameterKind], ...]

    @classmethod
    def of(cls, state: nnx.State) -> ParameterKinds:
        """From a module's parameters.

        Raises:
            ValueError: a parameter that does not say what it is.
        """
        flat = nnx.to_flat_state(state)
        return cls(tuple((".".join(map(str, path)), _kind_of(variable, path)) for path, variable in flat))

    def find(self, path: tuple) -> ParameterKind:
        """The kind of the parameter that a key path leads to, whatever stands before its name in the path.

        Args:
            path: in the parameters, or in a pytree that holds trees like them, as a training state does.

        Raises:
            ValueError: no such parameter.
        """
        names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        if names[-1] in ("value", "raw_value"):  # of a Flax variable
            names.pop()
        names = [name for name in names if isinstance(name, str)]
        for start in range(len(names)):
            kind = self._by_name.get(".".join(names[start:]))
            if kind is not None:
                return kind
        raise ValueError(f"parameter {'.'.join(names)}: is none of the model's, so nobody knows what it is")

    def axes(self, path: tuple, ndim: int) -> tuple[str | None, ...]:
        """Logical axes of a leaf of a training state, by its path; a scalar and a PRNG key have none.

        Args:
            path: as in `find`.
            ndim: its rank.

        Raises:
            ValueError: no such parameter, or one of another rank.
        """
        if ndim == 0:
            return ()
        kind = self.find(path)
        axes = kind.stacked_axes(ndim)
        if axes is None:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"parameter {name} of rank {ndim}: has the logical axes {kind.axes}, which do not fit")
        return axes

    def map(self, function: Callable[[ParameterKind, Any], Any], params: PyTree) -> PyTree:
        """`function` of every kind and leaf of a pytree of parameters."""
        return jax.tree.map_with_path(lambda path, leaf: function(self.find(path), leaf), params)

    @functools.cached_property
    def _by_name(self) -> dict[str, ParameterKind]:
        return dict(self.entries)


def cast_matrices(dtype: Any) -> Callable[[ParameterKind, Array], Array]:
    """For `ParameterKinds.map`: matrices in the compute dtype, all else as it is."""
    return lambda kind, array: array.astype(dtype) if kind.is_cast else array


def _kind_of(variable: nnx.Variable, path: tuple) -> ParameterKind:
    kind = variable.get_metadata().get("kind")
    if not isinstance(kind, ParameterKind):
        name = ".".join(map(str, path))
        raise ValueError(f"parameter {name}: does not say what it is; make it with moda_jax.parameter.parameter")
    return kind
