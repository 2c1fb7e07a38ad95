"""Trains a small model by Muon on a mesh of all devices and on one, and stores both: `python -m ... DIRECTORY`.

Per name, "mesh" and "one": `<name>.npz`, the losses and the last parameters; `shards.json`: of the mesh, how many
elements of every momentum lie on a device, and how many it has.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from support import mesh_training

MESH = {"data": 1, "fsdp": 2, "tensor": 2}
STEPS = 4
CONFIG = dataclasses.replace(
    mesh_training.CONFIG, optimizer=dataclasses.replace(mesh_training.CONFIG.optimizer, name="muon")
)


def train(config, name: str, directory: Path) -> None:
    """A few steps, stored."""
    initialize, step, program = mesh_training.build(config, one_device=name == "one")
    state, losses = initialize(), []
    for number in range(STEPS):
        batch = program.distribution.place(mesh_training.packed_batch(config, number))
        state, metrics = step(state, batch, program.plan)
        losses.append(float(metrics.loss))
    leaves = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state.params)}
    np.savez(directory / f"{name}.npz", losses=np.array(losses), **leaves)
    if name == "mesh":
        momentum = state.optimizer_state[1].inner_states["muon"].inner_state[0].mu
        shards = {
            jax.tree_util.keystr(path): (leaf.addressable_shards[0].data.size, leaf.size)
            for path, leaf in jax.tree.leaves_with_path(momentum)
        }
        (directory / "shards.json").write_text(json.dumps(shards))


def main(directory: Path) -> None:
    """Both."""
    train(CONFIG, "one", directory)
    train(mesh_training.on_mesh(CONFIG, MESH), "mesh", directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
