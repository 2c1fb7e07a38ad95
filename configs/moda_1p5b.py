"""The paper's 1.5B model: MoDA with the FFN KV projection, the 700M recipe.

The paper does not give its dimensions. These have the ratios of the 700M model and 1.50B parameters, 1.59B with the FFN
KV projections. See moda_700m.py for data and batch; the micro-batch is 4 sequences here.
"""

from ml_collections import ConfigDict

from configs import moda_700m


def get_config() -> ConfigDict:
    config = moda_700m.get_config("row4")
    config.model.num_layers = 38
    config.model.width = 1536
    config.model.num_heads = 24
    config.model.num_kv_heads = 12
    config.model.ffn_width = 6144
    config.train.accumulation_steps = 256
    return config
