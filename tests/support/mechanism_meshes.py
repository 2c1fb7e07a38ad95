"""Trains small models of depth mechanisms on a mesh of 8 virtual devices and on one: `python -m ... DIRECTORY`.

Per mechanism: `NAME.npz` and `NAME.one.npz` (losses, the first step's gradients) and `NAME.hlo`, the compiled step.
"""

import dataclasses
import sys
from pathlib import Path

from support.mechanisms import FULL
from support.mesh_training import CONFIG, on_mesh, train

from moda_jax.config import TransformerConfig

MESH = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}
# As there, sizes are such that no other array has as many elements as a stream, or its part on a device.
CONFIGS = {
    name: dataclasses.replace(
        CONFIG, model=TransformerConfig.from_dict(dataclasses.asdict(CONFIG.model) | fields | {"num_layers": 5}),
        train=dataclasses.replace(CONFIG.train, accumulation_steps=1),
    )
    for name, fields in (FULL | {"value_mixing": {"depth": "value_mixing", "value_mixing": {"stride": 1}}}).items()
}  # fmt: skip


def main(directory: Path) -> None:
    for name, config in CONFIGS.items():
        train(on_mesh(config, MESH), name, directory, steps=2)
        train(config, f"one_{name}", directory, steps=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
