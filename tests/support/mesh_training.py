"""Trains a small MoDA model on meshes of all devices and on one, and stores what each did: `python -m ... DIRECTORY`.

Per mesh: `<name>.npz` (20 losses, the first step's gradients) and `<name>.hlo`, the optimised program.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
from support.quick_compile import QUICK

from moda_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, TrainConfig, TransformerConfig
from moda_jax.data.packing import Batch
from moda_jax.training.program import Program

STEPS = 20
MESHES = {
    "data8": {"data": 8},
    "fsdp8": {"data": 1, "fsdp": 8},
    "tensor2_fsdp4": {"data": 1, "fsdp": 4, "tensor": 2},
    "data2_context4": {"data": 2, "context": 4},
    "all_axes": {"data": 2, "fsdp": 2, "tensor": 2, "context": 2},  # 16 devices
}
# The one of the default run, on 4 devices.
QUICK_NAME, QUICK_MESH = "fsdp2_context2", {"data": 1, "fsdp": 2, "context": 2}

# Table 3's row 4: MoDA with the FFN's depth entry. The vocabulary is odd, so that tensor=2 needs padding. Sizes are
# such that no other array has as many elements as the depth stream or its part on a device.
MODEL = TransformerConfig(
    vocab_size=259, num_layers=4, width=56, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=96,
    max_sequence_length=256, dtype="float32", depth="moda", depth_ffn_kv=True, attention_implementation="xla",
)  # fmt: skip
CONFIG = Config(
    model=MODEL,
    data=DataConfig(sequence_length=40),
    # No clipping: Adam's first moment after a step is then 0.1 x gradient.
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2, gradient_clip_norm=1e9, beta1=0.9),
    train=TrainConfig(batch_size=16, num_steps=STEPS, accumulation_steps=2),
    mesh=MeshConfig(data=1),
)

# 64 tokens per device on 4 devices, in two pieces of 32: documents end inside pieces, at a piece's end, and after one
# token.
BOUNDARIES = (20, 64, 65, 100, 150, 245)
BOUNDARY = dataclasses.replace(
    CONFIG, data=DataConfig(sequence_length=256), train=TrainConfig(batch_size=2, num_steps=2, accumulation_steps=1),
    optimizer=dataclasses.replace(CONFIG.optimizer, warmup_steps=1),
)  # fmt: skip


# Only compiled. So many tokens that what attention walks over block by block does not show.
MEMORY = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(
        MODEL, vocab_size=64, num_layers=5, width=128, num_heads=8, head_dim=16, ffn_width=512,
        max_sequence_length=1024,
    ),
    data=DataConfig(sequence_length=1024), train=TrainConfig(batch_size=64, num_steps=STEPS),
)  # fmt: skip
MEMORY_MESHES = {
    "data8": {"data": 8},
    "fsdp8": {"data": 1, "fsdp": 8},
    "tensor2_fsdp4": {"data": 1, "fsdp": 4, "tensor": 2},
    "data2_context4": {"data": 2, "context": 4},
    "fsdp2_context4": {"data": 1, "fsdp": 2, "context": 4},
}


def packed_batch(config: Config, seed: int, boundaries: tuple[int, ...] | None = None) -> Batch:
    """Random tokens in rows of several documents each; boundaries None: random ones, other in every row.

    A target is its token's successor, so that there is something to learn and the loss falls.
    """
    random = np.random.default_rng(seed)
    shape = (config.train.batch_size, config.data.sequence_length)
    tokens = random.integers(0, config.model.vocab_size, size=shape).astype(np.int32)
    targets = (tokens + 1) % config.model.vocab_size
    segment_ids, positions = np.zeros((2, *shape), np.int32)
    for row in range(shape[0]):
        ends = boundaries or sorted(random.choice(np.arange(1, shape[1]), size=3, replace=False).tolist())
        starts = [0, *ends]
        for number, (start, end) in enumerate(zip(starts, [*ends, shape[1]], strict=True)):
            segment_ids[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
    mask = (random.random(size=shape) < 0.8).astype(np.float32)
    return Batch(tokens, targets, segment_ids, positions, mask)


def build(config: Config, *, one_device: bool, devices=None, options=QUICK):
    """(jitted state maker, compiled train step, its program)."""
    program = Program(config, devices=jax.devices()[:1] if one_device else devices)
    return program.initialize, program.trace_train_step().lower().compile(options), program


def train(config: Config, name: str, directory: Path, *, steps: int, boundaries=None) -> None:
    """Trains and stores; the name "one" is one device."""
    initialize, step, program = build(config, one_device=name.startswith("one"))
    state, losses = initialize(), []
    for number in range(steps):
        state, metrics = step(state, program.distribution.place(packed_batch(config, number, boundaries)), program.plan)
        losses.append(float(metrics.loss))
        if number == 0:
            moments = jax.tree.leaves_with_path(state.optimizer_state[1].mu)
            gradients = {jax.tree_util.keystr(path): np.asarray(leaf) / 0.1 for path, leaf in moments}
    np.savez(directory / f"{name}.npz", losses=np.array(losses), **gradients)
    (directory / f"{name}.hlo").write_text(step.as_text())


def memory(config: Config, *, one_device: bool = False) -> dict[str, int]:
    """Bytes of one device: arguments and temporaries of the compiled step."""
    analysis = build(config, one_device=one_device)[1].memory_analysis()
    return {"arguments": analysis.argument_size_in_bytes, "temporaries": analysis.temp_size_in_bytes}


def on_mesh(config: Config, mesh: dict[str, int]) -> Config:
    """The config with this mesh."""
    return dataclasses.replace(config, mesh=MeshConfig(**mesh))


def main(directory: Path) -> None:
    """All runs that this number of devices allows."""
    if jax.device_count() == math.prod(QUICK_MESH.values()):
        train(CONFIG, "one", directory, steps=STEPS)
        train(on_mesh(CONFIG, QUICK_MESH), QUICK_NAME, directory, steps=STEPS)
    for name, mesh in MESHES.items():
        if math.prod(mesh.values()) == jax.device_count():
            train(on_mesh(CONFIG, mesh), name, directory, steps=STEPS)
    if jax.device_count() != 8:
        return
    train(CONFIG, "one", directory, steps=STEPS)
    train(BOUNDARY, "one_boundary", directory, steps=1, boundaries=BOUNDARIES)
    train(on_mesh(BOUNDARY, {"data": 2, "context": 4}), "boundary", directory, steps=1, boundaries=BOUNDARIES)
    found = {name: memory(on_mesh(MEMORY, mesh)) for name, mesh in MEMORY_MESHES.items()}
    found["one"] = memory(MEMORY, one_device=True)
    (directory / "memory.json").write_text(json.dumps(found))
    kept = dataclasses.replace(MEMORY, model=dataclasses.replace(MEMORY.model, remat="none"))
    step = build(on_mesh(kept, MEMORY_MESHES["fsdp8"]), one_device=False)[1]
    (directory / "everything_kept.hlo").write_text(step.as_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
