"""The oracle itself: its gradients against finite differences of its own outputs, its softmax against the textbook."""

import numpy as np
from support.attention_oracle import GRADIENTS, attention

INPUTS = ("query", "key", "value", "depth_key", "depth_value")


def _case():
    draw = np.random.default_rng(0)
    B, T, U, S, N, K, H = 2, 4, 5, 3, 4, 2, 3
    arrays = [(B, T, N, H), (B, U, K, H), (B, U, K, H), (B, T, S, K, H), (B, T, S, K, H)]
    inputs = {name: draw.standard_normal(shape) for name, shape in zip(INPUTS, arrays, strict=True)}
    options = {
        "depth_length": 2, "scale": 0.7, "causal": True,
        "query_positions": draw.integers(0, 6, (B, T)), "key_positions": draw.integers(0, 6, (B, U)),
        "query_segment_ids": draw.integers(0, 2, (B, T)), "key_segment_ids": draw.integers(0, 2, (B, U)),
        "key_length": np.array([5, 3]),
    }  # fmt: skip
    return inputs, options, draw.standard_normal((B, T, N, H)), draw.standard_normal((B, T, N)), draw


def test_gradients_are_those_of_finite_differences():
    inputs, options, dout, dlse, draw = _case()
    gradients = attention(**inputs, **options, dout=dout, dlse=dlse)

    def objective(**arrays):
        result = attention(**arrays, **options)
        return np.sum(result["out"] * dout) + np.sum(result["lse"] * dlse)

    for name, gradient in zip(INPUTS, GRADIENTS, strict=True):
        for _ in range(3):
            direction = draw.standard_normal(inputs[name].shape)
            step = 1e-5 * direction
            high = objective(**(inputs | {name: inputs[name] + step}))
            low = objective(**(inputs | {name: inputs[name] - step}))
            np.testing.assert_allclose(np.sum(gradients[gradient] * direction), (high - low) / 2e-5, rtol=1e-7)


def test_one_row_is_the_textbook_softmax():
    inputs, options, *_ = _case()
    options |= {"query_segment_ids": None, "key_segment_ids": None, "key_length": None, "query_positions": None}
    result = attention(**inputs, **(options | {"key_positions": None}))
    b, t, n, kv = 1, 2, 3, 1
    keys = np.concatenate([inputs["key"][b, :3, kv], inputs["depth_key"][b, t, :2, kv]])
    values = np.concatenate([inputs["value"][b, :3, kv], inputs["depth_value"][b, t, :2, kv]])
    weights = np.exp(0.7 * keys @ inputs["query"][b, t, n])
    np.testing.assert_allclose(result["out"][b, t, n], weights @ values / weights.sum(), rtol=1e-12)
    np.testing.assert_allclose(result["lse"][b, t, n], np.log(weights.sum()), rtol=1e-12)
