"""Continues prompts: `python generate.py --workdir=RUN --prompt="TEXT"`; see `--help`. The same as `moda-generate`."""

from moda_jax.commands.generate import main

if __name__ == "__main__":
    main()
