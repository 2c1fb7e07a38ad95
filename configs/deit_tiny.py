"""DeiT-Ti with its recipe (arXiv 2012.12877) on ImageNet-1k, without depth and with MoDA's: configs/deit_tiny.py:none,
:moda and :moda_64l (64 layers).

ImageNet comes from a folder: `--config.data.source=DIRECTORY` with `train` and `val` in it.
"""

from ml_collections import ConfigDict

from configs import base

NAMES = ("none", "moda", "moda_64l")
_IMAGES = 1281167
_EPOCHS, _WARMUP_EPOCHS = 300, 5
_BATCH = 1024


def get_config(name: str = "moda") -> ConfigDict:
    return deit("configs/deit_tiny.py", name, width=192, num_heads=3)


def deit(file: str, name: str, *, width: int, num_heads: int) -> ConfigDict:
    """A DeiT of so many channels and heads; `name` is one of NAMES.

    Raises:
        ValueError: another name.
    """
    if name not in NAMES:
        raise ValueError(f"{file}:{name}: unknown argument; known: {', '.join(NAMES)}")
    config = base.get_config()
    config.train.task = "vision"
    model = config.model
    model.causal = False
    model.rope_theta = None
    model.norm = "pre"
    model.norm_kind = "layer"
    model.ffn = "gelu"
    model.biases = True
    model.qk_norm = False
    model.width = width
    model.num_heads = model.num_kv_heads = num_heads
    model.head_dim = width // num_heads
    model.ffn_width = 4 * width
    model.num_layers = 64 if name == "moda_64l" else 12
    model.depth = "none" if name == "none" else "moda"
    model.layer_loop = "scan" if name == "moda_64l" else "unroll"  # 64 layers by themselves take long to compile
    model.stochastic_depth = 0.1
    data = config.data
    data.source = "imagenet"  # a folder of this name; --config.data.source=... for another place
    data.train_split, data.validation_split = "train", "val"
    data.images.augmentation_repeats = 3
    data.images.crop_scale = 0.08
    data.images.flip = True
    data.images.rand_augment_magnitude = 9.0
    data.images.erase_probability = 0.25
    data.images.mixup_alpha = 0.8
    data.images.cutmix_alpha = 1.0
    data.images.label_smoothing = 0.1
    data.images.workers = 8
    steps_per_epoch = _IMAGES // _BATCH
    config.train.batch_size = _BATCH
    config.train.num_steps = _EPOCHS * steps_per_epoch
    config.train.z_loss = 0.0
    config.train.log_interval_steps = 50
    config.optimizer.learning_rate = 1e-3  # 5e-4 for each 512 images of a batch
    config.optimizer.final_learning_rate_fraction = 0.01
    config.optimizer.warmup_steps = _WARMUP_EPOCHS * steps_per_epoch
    config.optimizer.beta2 = 0.999
    config.optimizer.weight_decay = 0.05
    config.optimizer.gradient_clip_norm = 1e6  # DeiT's are not clipped
    config.optimizer.ema_decay = 0.99996
    config.eval.interval_steps = 5 * steps_per_epoch
    config.eval.num_batches = 0
    config.checkpoint.interval_steps = steps_per_epoch
    return config
