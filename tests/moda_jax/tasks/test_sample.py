import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quick_compile import QUICK
from support.quick_inference import quick_inference
from support.saved_run import random_model

from moda_jax.config import TransformerConfig
from moda_jax.data.tokenizer import ByteTokenizer
from moda_jax.tasks.sample import sample_text

CONFIG = TransformerConfig(
    vocab_size=300, num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_dim=8, ffn_width=16,
    max_sequence_length=32, dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    with quick_inference():
        yield random_model(CONFIG)


def sample(model, *, params=None, prompt="ab", temperature=0.8, seed=0, num_tokens=12):
    function, own = model
    return sample_text(
        function, params or own, ByteTokenizer(), prompt, num_tokens=num_tokens, key=jax.random.key(seed),
        temperature=temperature,
    )  # fmt: skip


def test_cold_sampling_takes_the_likeliest_token_each_time(model):
    function, params = model
    sharp = jax.tree.map(lambda p: 20 * p, params)  # a fresh model's logits are nearly equal
    tokens = list(b"ab")
    forward = jax.jit(function, compiler_options=QUICK)
    while len(tokens) < 14:
        padded = np.zeros((1, 14), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(forward(sharp, padded)[0, len(tokens) - 1, :257])))
    expected = ByteTokenizer().decode(tokens[: tokens.index(256)] if 256 in tokens else tokens)
    assert sample(model, params=sharp, temperature=1e-6) == expected


def test_the_key_decides(model):
    texts = [sample(model, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("ab")


def test_the_text_ends_at_the_first_end_of_text(model):
    _, params = model
    table = np.array(params["embedding"]["table"])
    table[:] = 0
    table[:, 0] = 1.0
    table[256, 0] = 50.0  # tied: the end-of-text token wins everywhere
    assert sample(model, params=params | {"embedding": {"table": jnp.asarray(table)}}, temperature=0.01) == "ab"


def test_a_prompt_without_tokens_is_an_error(model):
    with pytest.raises(ValueError, match="prompt='': gives no tokens"):
        sample(model, prompt="")
