"""Which packages a wheel holds; all else stands in pyproject.toml.

`configs` and `experiments` lie at the top level of the repository, where people look for them, and inside of `moda_jax`
in a wheel: site-packages belongs to everybody, and such names are not ours to take. `benchmarks` measures this
repository's kernels and stays in it, as `tests` does.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=("moda_jax*", "pallas_kernels*")),
        "moda_jax.configs",
        "moda_jax.experiments",
        "moda_jax.experiments.plans",
    ],
    package_dir={
        "moda_jax.configs": "configs",
        "moda_jax.experiments": "experiments",
        "moda_jax.experiments.plans": "experiments/plans",
    },
)
