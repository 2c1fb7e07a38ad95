"""The paper's 700M models (Table 3): OLMo 2's recipe, 400B tokens.

    --config=configs/moda_700m.py:ROW      row1  OLMo 2, 36 layers                        669.0M parameters
                                           row2  OLMo 2, 38 layers                        700.5M
                                           row3  MoDA, depth KV                           669.0M
                                           row4  MoDA, + FFN KV projection (the default)  705.7M
                                           row5  MoDA, + attention KV projection          742.4M

The paper's data is the OLMo 2 mix under its own tokenizer: set `data.source` and `data.tokenizer` to yours. As it
stands, the config runs on the built-in corpus, byte by byte, which is good for a test and for nothing else.

The batch is 1024 sequences of 4096 tokens in 128 micro-batches of 8 sequences; for a run that one GPU can finish, cut
`train.batch_size`, `train.accumulation_steps` and `train.num_steps`.

Everything is kept for the backward pass (`remat="none"`) and every layer is compiled by itself (`layer_loop="unroll"`):
the fastest way on a GPU of 80 GB with micro-batches of 8. With less memory take `remat="ffn"` or "attention".
"""

from ml_collections import ConfigDict

from configs import base

ROWS = {
    "row1": {"num_layers": 36, "depth": "none"},
    "row2": {"num_layers": 38, "depth": "none"},
    "row3": {"num_layers": 36, "depth": "moda", "depth_ffn_kv": False, "depth_attn_kv": False},
    "row4": {"num_layers": 36, "depth": "moda", "depth_ffn_kv": True, "depth_attn_kv": False},
    "row5": {"num_layers": 36, "depth": "moda", "depth_ffn_kv": True, "depth_attn_kv": True},
}


def get_config(row: str = "row4") -> ConfigDict:
    if row not in ROWS:
        raise ValueError(f"configs/moda_700m.py:{row}: unknown argument; known: {', '.join(ROWS)}")
    config = base.get_config()
    config.model.vocab_size = 100278
    config.model.width = 1024
    config.model.num_heads = 16
    config.model.num_kv_heads = 8
    config.model.head_dim = 64
    config.model.ffn_width = 4096
    config.model.max_sequence_length = 4096
    config.model.remat = "none"
    config.model.layer_loop = "unroll"
    config.model.update(ROWS[row])
    config.data.sequence_length = 4096
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 2000
    config.train.batch_size = 1024
    config.train.accumulation_steps = 128
    config.train.num_steps = 95367  # 400B tokens / (1024 * 4096)
    config.eval.interval_steps = 1000
    config.checkpoint.interval_steps = 500
    config.checkpoint.keep_every_steps = 10000
    return config
