"""The 400M models of DepthBench (arXiv 2609.32534), whose MoDA weights are public: one function in both projects.

    --config=configs/depthbench.py:NAME    moda_L26    pre-norm MoDA
                                           post_L26    norm(x + f(x)) with MoDA
                                           none_L26    pre-norm, no depth

NAME ends in the number of layers: L16, L20, L24, L26, L28, L30, L32. All have 16 heads, as many KV heads, and no
QK-norm; a deeper model is a narrower one. Depth keys are as projected and not rotated (`moda.key=writer_norm` without
a norm), and the FFN writes an entry. `python -m moda_jax.interop import` reads their checkpoints. They were trained on
8B tokens of FineWeb-Edu: set `data.source` and `data.tokenizer` (GPT-NeoX's, 50280 tokens, whose last ends a text).
"""

from ml_collections import ConfigDict

from configs import base

SIZES = {  # layers: (width, FFN hidden)
    16: (1216, 3248), 20: (1120, 2992), 24: (1024, 2736), 26: (992, 2656), 28: (960, 2560), 30: (928, 2480),
    32: (896, 2400),
}  # fmt: skip
FORMS = {"moda": ("pre", "moda"), "post": ("post_sum", "moda"), "none": ("pre", "none")}
NAMES = {f"{form}_L{layers}": (form, layers) for form in FORMS for layers in SIZES}


def get_config(name: str = "moda_L26") -> ConfigDict:
    if name not in NAMES:
        raise ValueError(f"configs/depthbench.py:{name}: unknown argument; known: {', '.join(NAMES)}")
    form, layers = NAMES[name]
    config = base.get_config()
    config.model.vocab_size = 50280
    config.model.num_layers = layers
    config.model.width, config.model.ffn_width = SIZES[layers]
    config.model.num_heads = config.model.num_kv_heads = 16
    config.model.head_dim = config.model.width // 16
    config.model.norm, config.model.depth = FORMS[form]
    config.model.moda.key = "writer_norm"
    config.model.qk_norm = False
    config.model.rope_theta = 10000.0
    config.model.tie_embeddings = False
    config.model.max_sequence_length = 2048
    config.data.sequence_length = 2048
    config.optimizer.learning_rate = 1e-3 if form == "post" else 2e-3
    config.optimizer.warmup_steps = 760
    config.train.batch_size = 512
    config.train.accumulation_steps = 32
    config.train.num_steps = 7600
    config.train.z_loss = 0.0
    return config
