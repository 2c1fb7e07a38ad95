"""What a training run needs of the mesh, in one object: where state and batches lie, and who does what.

On one device every method is the identity: the run is the same as if this module were not there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from moda_jax.config import Config
from moda_jax.parallel import parameters
from moda_jax.parallel.batches import BatchPlacement, RowShare
from moda_jax.parallel.mesh import check_config, make_mesh, mesh_sizes, on_mesh
from moda_jax.parameter import ParameterKinds


class Distribution:
    """The mesh of a run and the layout of its arrays.

    Args:
        config: the run. Sizes are checked here, the parameters' when `initializer` is called.
        layout: of a global batch, a pytree of `ArrayLayout`.
        kinds: what the model's parameters are.
        devices: None: all devices of all processes.

    Raises:
        ValueError: the mesh does not fit the devices, the batch or the sequence.

    Attributes:
        mesh: None on one device.
        rows: the block of every batch that this process reads.
        is_first: this process writes logs, metrics and the config.
    """

    def __init__(self, config: Config, layout: Any, kinds: ParameterKinds, devices: Sequence[jax.Device] | None = None):
        devices = jax.devices() if devices is None else devices
        self._layout, self._kinds = layout, kinds
        self.sizes = mesh_sizes(config.mesh, len(devices))
        check_config(config, self.sizes)
        self.mesh = make_mesh(config.mesh, devices)
        self.is_first = jax.process_index() == 0
        self._batches = None
        self.rows = RowShare(0, 1)
        if self.mesh is not None:
            self._batches = BatchPlacement(self.mesh, layout)
            self.rows = self._batches.share

    def initializer(self, initialize: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """`initialize(*arguments)`, which makes the training state, jitted so that every device makes its own part.

        The compiled program does not depend on the arguments' values.

        Raises:
            ValueError: a parameter does not divide; named with axis and sizes.
        """
        if self.mesh is None:
            return functools.partial(jax.jit(initialize), *arguments)

        abstract = jax.eval_shape(initialize, *arguments)
        parameters.check_divisible(self.sizes, abstract.params, self._kinds)
        shardings = parameters.state_shardings(self.mesh, abstract, self._kinds)
        return functools.partial(jax.jit(initialize, out_shardings=shardings), *arguments)

    def abstract_state(self, initialize: Callable[[], Any]) -> Any:
        """Shapes, dtypes and shardings of the state that `initializer` makes."""
        state = jax.eval_shape(initialize)
        return (
            state if self.mesh is None else _abstract(state, parameters.state_shardings(self.mesh, state, self._kinds))
        )

    def abstract_batch(self) -> Any:
        """Shapes, dtypes and shardings of what `place` returns."""
        if self._batches is not None:
            return self._batches.abstract()
        return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), self._layout)

    def place(self, batch: Any) -> Any:
        """A batch as the pipeline makes it, on the devices."""
        return batch if self._batches is None else self._batches(batch)

    def place_everywhere(self, values: Any) -> Any:
        """Host values that every process has, whole on each device."""
        if self.mesh is None:
            return jax.device_put(values)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(
            lambda value: jax.make_array_from_callback(np.shape(value), everywhere, lambda _: np.asarray(value)), values
        )

    def place_params(self, params: Any, abstract: Any) -> Any:
        """Parameters that every process has whole, each where `abstract`, the state's, says that it lies."""
        if self.mesh is None:
            return params

        def place(leaf: Any, wanted: Any) -> jax.Array:
            whole = np.asarray(leaf)
            return jax.make_array_from_callback(wanted.shape, wanted.sharding, lambda index: whole[index])

        return jax.tree.map(place, params, abstract)

    def jit_train_step(self, train_step: Callable, state: Any) -> Any:
        """`train_step` (state, batch, plan) -> (state, metrics), jitted on the mesh, its state donated."""
        if self.mesh is None:
            return jax.jit(train_step, donate_argnums=0)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(on_mesh(self.mesh, train_step), donate_argnums=0, out_shardings=(shardings, everywhere))

    def jit_eval_step(self, eval_step: Callable) -> Any:
        """`eval_step` (params, batch) -> sums, jitted on the mesh."""
        if self.mesh is None:
            return jax.jit(eval_step)
        return jax.jit(on_mesh(self.mesh, eval_step), out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def agree(self, name: str) -> None:
        """Waits until all processes have come here."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(name)


def _abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)


def resolved_mesh(config: Config) -> Config:
    """The config with -1 of the mesh replaced by this run's size."""
    sizes = mesh_sizes(config.mesh, jax.device_count())
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
