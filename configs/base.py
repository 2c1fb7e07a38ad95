"""Every field of a run, with its default. What a field means stands beside it in `moda_jax/config.py`.

Any field can be set on the command line: `--config=configs/quickstart.py --config.train.num_steps=1000`.
"""

from ml_collections import ConfigDict

from moda_jax.config import Config
from moda_jax.training.run_config import as_config_dict


def get_config() -> ConfigDict:
    """The dataclasses' defaults as a ConfigDict; one that may be None is a typed placeholder."""
    return as_config_dict(Config())
