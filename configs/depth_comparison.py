"""Does the depth stream help? Twelve `small`-like layers cut to CPU size, with and without it, at equal steps and seed.

    python train.py --config=configs/depth_comparison.py:none
    python train.py --config=configs/depth_comparison.py:moda

`none` is OLMo 2; `moda` adds the depth stream with the FFN KV projection (Table 3 row 4); `moda_own_kv` adds the depth
stream alone (row 3), with not one parameter more than `none`. All else is equal, the data order too.
"""

from ml_collections import ConfigDict

from configs import base

DEPTHS = {
    "none": {"depth": "none"},
    "moda": {"depth": "moda", "depth_ffn_kv": True},
    "moda_own_kv": {"depth": "moda", "depth_ffn_kv": False},
}


def get_config(depth: str = "moda") -> ConfigDict:
    if depth not in DEPTHS:
        raise ValueError(f"configs/depth_comparison.py:{depth}: unknown argument; known: {', '.join(DEPTHS)}")
    config = base.get_config()
    config.model.vocab_size = 257
    config.model.num_layers = 12
    config.model.width = 96
    config.model.num_heads = 6
    config.model.num_kv_heads = 2
    config.model.head_dim = 16
    config.model.ffn_width = 384
    config.model.max_sequence_length = 256
    config.model.update(DEPTHS[depth])
    config.model.initializer_range = 0.08  # 0.02 suits wide models
    config.data.sequence_length = 256
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 60
    config.train.batch_size = 4
    config.train.num_steps = 1500
    config.eval.interval_steps = 500
    config.eval.num_batches = 256  # 1024 rows, evenly over the validation split
    config.checkpoint.interval_steps = 500
    return config
