"""The command `python -m moda_jax.training.metrics compare RUN RUN ...`, see `moda_jax.training.compare`."""

from __future__ import annotations

from moda_jax.training.compare import main

if __name__ == "__main__":
    raise SystemExit(main())
