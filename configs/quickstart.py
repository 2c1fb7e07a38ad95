"""A small MoDA model on the source of Python's standard library, byte by byte: two minutes on two CPU cores."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.vocab_size = 257
    config.model.num_layers = 4
    config.model.width = 128
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.head_dim = 32
    config.model.ffn_width = 384
    config.model.max_sequence_length = 512
    config.model.initializer_range = 0.08  # 0.02 suits wide models; at this width the embeddings would start too small
    config.data.sequence_length = 256
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_steps = 50
    # Few tokens per step and many steps: with so little time, steps are what is short.
    config.train.batch_size = 4
    config.train.num_steps = 1400
    config.train.log_interval_steps = 25
    config.train.sample_prompt = "import os\n\n\ndef "
    config.train.sample_tokens = 240  # with the prompt, as long as a training row
    config.eval.interval_steps = 350
    config.eval.num_batches = 64
    config.checkpoint.interval_steps = 350
    return config
