"""Trains a model: `python train.py --config=configs/quickstart.py`; see `--help`. The same as `moda-train`."""

from moda_jax.commands.train import main

if __name__ == "__main__":
    main()
