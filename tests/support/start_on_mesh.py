"""Places parameters that come from elsewhere on a mesh of 4 devices: `python -m ...`, which prints what it found."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from support import mesh_training

from moda_jax.training.program import Program


def main() -> None:
    """Every leaf whole again, and laid out as the training state's."""
    model = dataclasses.replace(mesh_training.MODEL, num_layers=3)
    config = dataclasses.replace(mesh_training.CONFIG, model=model)
    program = Program(mesh_training.on_mesh(config, {"data": 1, "fsdp": 2, "tensor": 2}))
    wanted, random = program.abstract_state.params, np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), wanted)
    placed = program.distribution.place_params(params, wanted)
    for ours, whole, leaf in zip(*map(jax.tree.leaves, (placed, params, wanted)), strict=True):
        assert ours.sharding == leaf.sharding and ours.dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(ours), whole)
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
    print(f"{len(jax.tree.leaves(placed))} leaves, {split} split")


if __name__ == "__main__":
    main()
