"""Evaluates a run: `python evaluate.py --workdir=RUN --depth-probes`, and more; see `--help`. Also `moda-evaluate`."""

from moda_jax.commands.evaluate import main

if __name__ == "__main__":
    main()
