"""Steps of the vision task with its whole recipe on a mesh of four devices, and on one: `python -m ... DIRECTORY`.

Stores losses and the first step's gradients as `<name>.npz`, and with the mesh the metrics of an evaluation.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
from support.mesh_training import on_mesh
from support.quick_compile import QUICK
from support.tiny_vision import vision_config

from moda_jax.training.averaged import averaged_params
from moda_jax.training.program import Program

MESH = {"data": 1, "fsdp": 2, "tensor": 2}
STEPS = 4


def run(config, name, directory, devices):
    program = Program(config, devices=devices)
    data = program.task.open_data(program.distribution.rows)
    step = program.trace_train_step().lower().compile(QUICK)
    state, losses = program.initialize(), []
    with data.train_batches(0) as batches:
        for number in range(STEPS):
            state, metrics = step(state, program.distribution.place(next(batches)), program.plan)
            losses.append(float(metrics.loss))
            if number == 0:
                moments = jax.tree.leaves_with_path(state.optimizer_state[1].mu)
                gradients = {jax.tree_util.keystr(path): np.asarray(leaf) / 0.1 for path, leaf in moments}
    batch = program.distribution.place(next(data.validation_batches()))
    for weights in (state.params, averaged_params(state.optimizer_state)):
        losses.append(float(program.eval_step(weights, batch).loss))
    np.savez(directory / f"{name}.npz", losses=np.array(losses), **gradients)


def main(directory):
    config = vision_config(
        directory / "cache", model={"stochastic_depth": 0.3, "attention_implementation": "xla"},
        data={"images": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}},
        optimizer={"ema_decay": 0.9, "gradient_clip_norm": 1e9},
    )  # fmt: skip
    one = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1))
    run(one, "one", directory, jax.devices()[:1])
    run(on_mesh(config, MESH), "mesh", directory, jax.devices())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
