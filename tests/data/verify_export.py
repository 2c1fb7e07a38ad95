"""Checks that transformers reads what `moda_jax.interop` exports, and computes the same logits.

Needs torch and transformers, which the tests do not (environment: see make_olmo2_vectors.py). Two steps, since the two
sides live in different environments:

    python tests/data/verify_export.py write DIRECTORY        (environment of this project)
    python tests/data/verify_export.py check DIRECTORY        (environment of transformers)

`write` loads the stored checkpoints of olmo2_tiny/, changes every weight by training-like noise, exports the result and
stores this project's logits; `check` loads each with `Olmo2ForCausalLM.from_pretrained` and compares.
"""

import pathlib
import sys

import numpy as np

STORED = pathlib.Path(__file__).parent / "olmo2_tiny"
TOLERANCE = 1e-4


def write(directory: pathlib.Path) -> None:
    """Exports a changed copy of each stored model, with its logits."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from moda_jax.interop import export_model, load_olmo2

    for name in sorted(path.name for path in STORED.iterdir()):
        config, model = load_olmo2(STORED / name, dtype="float32")
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(params))))
        params = jax.tree.map(lambda p, keys=keys: p + 0.1 * jax.random.normal(next(keys), p.shape), params)
        nnx.update(model, nnx.State(params))
        tokens = np.load(STORED / name / "expected.npz")["tokens"]
        export_model(config, params, directory / name)
        np.savez(directory / name / "expected.npz", tokens=tokens, logits=np.asarray(model(jnp.asarray(tokens))))


def check(directory: pathlib.Path) -> None:
    """Compares; exits with an error if a model differs."""
    import torch
    from transformers import Olmo2ForCausalLM

    for folder in sorted(directory.iterdir()):
        model, info = Olmo2ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        unexpected = {key: value for key, value in info.items() if value}
        expected = np.load(folder / "expected.npz")
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(expected["tokens"]).long()).logits.numpy()
        error = np.abs(logits - expected["logits"]).max()
        print(f"{folder.name}: largest logit {np.abs(logits).max():.2f}, largest difference {error:.2e}", unexpected)
        if not error < TOLERANCE or unexpected:
            sys.exit(f"{folder.name}: differs")


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](pathlib.Path(sys.argv[2]))
