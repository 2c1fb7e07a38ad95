"""The paper's 700M baseline (Table 3 row 1): OLMo 2, 36 layers, no depth stream. Data and batch: see moda_700m.py."""

from ml_collections import ConfigDict

from configs import moda_700m


def get_config() -> ConfigDict:
    return moda_700m.get_config("row1")
