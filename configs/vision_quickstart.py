"""A small MoDA vision transformer on the digits that scikit-learn ships: two minutes on two CPU cores."""

from ml_collections import ConfigDict

from configs import base


def get_config(depth: str = "moda") -> ConfigDict:
    """`depth`: a depth mechanism, as configs/vision_quickstart.py:none."""
    config = base.get_config()
    config.train.task = "vision"
    config.data.source = "digits"
    config.data.validation_fraction = 0.2
    config.data.images.crop_fraction = 1.0
    config.data.images.normalisation = "half"
    config.data.images.crop_scale = 0.7
    config.data.images.mixup_alpha = 0.2
    config.model.image.size = 8
    config.model.image.patch_size = 2
    config.model.image.channels = 1
    config.model.image.num_classes = 10
    config.model.causal = False
    config.model.rope_theta = None
    config.model.norm = "pre"
    config.model.norm_kind = "layer"
    config.model.ffn = "gelu"
    config.model.biases = True
    config.model.qk_norm = False
    config.model.depth = depth
    config.model.num_layers = 4
    config.model.width = 64
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.head_dim = 16
    config.model.ffn_width = 256
    config.model.initializer_range = 0.08
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.beta2 = 0.999
    config.optimizer.weight_decay = 0.05
    config.optimizer.ema_decay = 0.99
    config.train.batch_size = 64
    config.train.num_steps = 1000
    config.train.z_loss = 0.0
    config.train.log_interval_steps = 25
    config.eval.interval_steps = 250
    config.eval.num_batches = 0
    config.checkpoint.interval_steps = 250
    return config
