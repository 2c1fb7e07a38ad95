"""What a model costs, from its config alone: parameters and arithmetic.

A multiply-add counts as two FLOPs, and only matrix products count: projections, FFN, logits, and attention's two
products (query x key, probabilities x value) over the sequence and over the filled depth slots. Softmax, norms, rotary
embedding and the look-up of the embedding are left out; the paper's FLOPs column (Table 3) lies 0.6 to 0.8 % above this
count in all five rows, and the differences between its rows agree to its last digit.

Of a vision transformer it is the same, without a vocabulary and with patches and a head. The number that is published
for one (1.26 G multiply-adds for DeiT-Ti) counts five operations for each value that a LayerNorm gives besides: without
them it is 1.254 G.

Symbols: V vocabulary, L layers, D width, N query heads, K key/value heads, H head_dim, F FFN hidden, T tokens.
"""

from __future__ import annotations

from moda_jax.config import TransformerConfig
from moda_jax.model.depth.registry import find_mechanism


def param_count(config: TransformerConfig) -> int:
    """Number of parameters of `Transformer(config)`; a tied embedding counts once."""
    vocabularies = 1 if config.tie_embeddings else 2
    return vocabularies * config.vocab_size * config.width + _trunk_parameters(config)


def image_param_count(config: TransformerConfig) -> int:
    """Number of parameters of `VisionTransformer(config)`."""
    image = config.image
    patches = (image.pixels + 1) * config.width
    added = image.tokens * config.width if image.positions == "learned" else 0
    added += config.width if image.pooling == "class_token" else 0
    return patches + added + _trunk_parameters(config) + (config.width + 1) * image.num_classes


def forward_flops(config: TransformerConfig, seq_len: int) -> float:
    """FLOPs of the forward pass over one sequence, as the paper counts them: attention over the full T x T.

    2 T (matrices + V D) + 4 T^2 L N H + T (the depth mechanism's reads; MoDA: 4 N H a slot, summed over the layers)

    Args:
        config: the model.
        seq_len: T, tokens of the sequence.

    Raises:
        ValueError: `seq_len` is below 1.
    """
    _check_seq_len(seq_len)
    logits = 2 * config.vocab_size * config.width
    return float(seq_len * (_trunk_flops(config, seq_len) + logits))


def image_forward_flops(config: TransformerConfig) -> float:
    """FLOPs of the forward pass over one image; half of it are multiply-adds."""
    image = config.image
    patches = 2 * image.grid**2 * image.pixels * config.width
    head = 2 * config.width * image.num_classes
    return float(image.tokens * _trunk_flops(config, image.tokens) + patches + head)


def image_train_flops(config: TransformerConfig) -> float:
    """FLOPs of one training step for one image, forward and backward, of which MFU is a share: the backward is twice
    the forward. Recomputation (`remat`) never counts."""
    return 3 * image_forward_flops(config)


def train_flops_per_token(config: TransformerConfig, seq_len: int) -> float:
    """FLOPs per token of one training step (forward and backward), of which MFU is a share of the hardware's peak.

    6 P + 6 L N H T + 3 (the depth mechanism's reads, forward)

    P are the parameters with the vocabulary counted once: a tied table is the matrix of the logits, an untied one is
    looked up and takes part in no product. The second term is causal attention: a token sees T / 2 others on average,
    two products of 2 N H FLOPs each, backward twice the forward. The third is what a token's reads of the depth stream
    cost, of which MoDA's see all slots that are filled. For `depth="none"` it is 0 and the formula is the usual one;
    for Table 3's row 4 it is 0.3 % of the sum. Recomputation (`remat`) is no model arithmetic and never counts.

    Args:
        config: the model.
        seq_len: T, tokens of a row. With several documents packed in a row this counts more attention than is done.

    Raises:
        ValueError: `seq_len` is below 1.
    """
    _check_seq_len(seq_len)
    parameters = param_count(config)
    if not config.tie_embeddings:
        parameters -= config.vocab_size * config.width
    attention = 6 * config.num_heads * config.head_dim * config.num_layers * seq_len
    return float(6 * parameters + attention + 3 * find_mechanism(config.depth).read_flops(config))


def _trunk_parameters(config: TransformerConfig) -> int:
    """Of the layers and the final norm."""
    norm = config.width * (1 if config.norm_kind == "rms" else 2)
    vectors = 2 * norm
    if config.qk_norm:
        vectors += (2 if config.qk_norm_per_head else config.num_heads + config.num_kv_heads) * config.head_dim
    if config.biases:
        vectors += (config.num_heads + 2 * config.num_kv_heads) * config.head_dim + config.width
        vectors += config.ffn_width + config.width if config.ffn == "gelu" else 0
    layers = config.num_layers * (_layer_matrices(config) + vectors) + find_mechanism(config.depth).parameters(config)
    return layers + norm


def _trunk_flops(config: TransformerConfig, tokens: int) -> int:
    """FLOPs of one token in the layers, forward, where attention is over so many tokens."""
    mechanism = find_mechanism(config.depth)
    matrices = config.num_layers * _layer_matrices(config) + mechanism.matrix_parameters(config)
    attention = 4 * config.num_heads * config.head_dim * config.num_layers * tokens
    return 2 * matrices + attention + mechanism.read_flops(config)


def _layer_matrices(config: TransformerConfig) -> int:
    """Weights of one layer without its norms and depth projections: query, output, key, value; gate, up, down."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.width * (heads * config.head_dim + (3 if config.ffn == "swiglu" else 2) * config.ffn_width)


def _check_seq_len(seq_len: int) -> None:
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len}: expected at least 1")
