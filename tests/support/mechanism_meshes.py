"""Trains a small model of a depth mechanism on a mesh of 8 virtual devices and on one: `python -m ... DIRECTORY NAME`.

Of it come `NAME.npz` and `one_NAME.npz` (losses, the first step's gradients) and `NAME.hlo`, the compiled step.
"""

import dataclasses
import sys
from pathlib import Path

from support.mechanisms import CASES, FULL
from support.mesh_training import CONFIG, on_mesh, train

from moda_jax.config import TransformerConfig

MESH = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}
MESHES = {"moda, chunk": {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}}  # the tokens of a chunk stay together
# What else reads or writes in a way of its own, a few that cover it. They take most of a minute each.
COVERING = ("depth_attention", "mudd", "moda, per-head norm of the writer", "moda, chunk", "moda, float8")
MODELS = FULL | {name: CASES[name] for name in COVERING}
MODELS |= {"value_mixing": {"depth": "value_mixing", "value_mixing": {"stride": 1}}}
# There the heads' results together are a sub-layer's input.
MODELS["depth_attention"] = CASES["depth_attention"] | {"width": CONFIG.model.num_heads * CONFIG.model.head_dim}
# Layers that add the gradients of their older slots together, where every device has its part of them.
MODELS["moda, per-head norm of the writer"] = CASES["moda, per-head norm of the writer"] | {"depth_gradient_group": 2}
# As there, sizes are such that no other array has as many elements as a stream, or its part on a device.
CONFIGS = {
    name: dataclasses.replace(
        CONFIG, model=TransformerConfig.from_dict(dataclasses.asdict(CONFIG.model) | fields | {"num_layers": 5}),
        train=dataclasses.replace(CONFIG.train, accumulation_steps=1),
    )
    for name, fields in MODELS.items()
}  # fmt: skip


def mesh_of(name: str) -> dict[str, int]:
    """The sizes of the mesh that a model is trained on."""
    return MESHES.get(name, MESH)


def main(directory: Path, name: str) -> None:
    train(on_mesh(CONFIGS[name], mesh_of(name)), name, directory, steps=2)
    train(CONFIGS[name], f"one_{name}", directory, steps=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
