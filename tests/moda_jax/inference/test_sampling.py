import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.inference.sampling import GREEDY, SamplingConfig, row_keys, sample

LOGITS = jnp.log(jnp.array([0.05, 0.4, 0.3, 0.2, 0.05]))
DRAWS = 4000


def frequencies(config, logits=LOGITS):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    tokens = sample(jnp.broadcast_to(logits, (DRAWS, len(logits))), keys, config)
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / DRAWS


def test_greedy_takes_the_likeliest_and_of_equals_the_first():
    logits = jnp.array([[0.0, 2.0, 1.0], [3.0, 3.0, 1.0]])
    tokens = sample(logits, jax.random.split(jax.random.key(0), 2), GREEDY)
    assert tokens.dtype == jnp.int32 and tokens.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SamplingConfig(1.0), [0.05, 0.4, 0.3, 0.2, 0.05]),
        (SamplingConfig(0.5), np.array([0.05, 0.4, 0.3, 0.2, 0.05]) ** 2 / 0.295),
        (SamplingConfig(1.0, top_k=2), [0, 4 / 7, 3 / 7, 0, 0]),
        (SamplingConfig(1.0, top_k=2**70), [0.05, 0.4, 0.3, 0.2, 0.05]),
        (SamplingConfig(1.0, top_p=0.39), [0, 1, 0, 0, 0]),
        (SamplingConfig(1.0, top_p=0.69), [0, 4 / 7, 3 / 7, 0, 0]),
        (SamplingConfig(1.0, top_p=0.71), [0, 4 / 9, 3 / 9, 2 / 9, 0]),
        (SamplingConfig(1.0, top_p=1.0), [0.05, 0.4, 0.3, 0.2, 0.05]),
        # Of the three that top-k leaves the first two hold 7 / 9.
        (SamplingConfig(1.0, top_k=3, top_p=0.77), [0, 4 / 7, 3 / 7, 0, 0]),
    ],
)
def test_frequencies(config, expected):
    expected = np.asarray(expected)
    came = frequencies(config)
    assert np.all(came[expected == 0] == 0)
    np.testing.assert_allclose(came, expected, atol=5 * np.sqrt(0.25 / DRAWS))


def test_top_k_keeps_exactly_k_of_equal_logits():
    assert np.count_nonzero(frequencies(SamplingConfig(1.0, top_k=2), jnp.zeros(5))) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1\.0: expected 0 \(greedy\) or a positive number"),
        ({"temperature": float("nan")}, "temperature=nan: expected"),
        ({"top_k": 0}, "top_k=0: expected at least 1"),
        ({"top_p": 0.0}, r"top_p=0\.0: expected a share in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1\.5: expected"),
    ],
)
def test_a_field_out_of_range_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**fields)


def test_a_rows_key_comes_from_its_prompt():
    a, b = np.array([1, 2]), np.array([2, 1])
    key = jax.random.key(3)

    def data(prompts, key=key):
        return [tuple(row) for row in np.asarray(jax.random.key_data(row_keys(key, prompts)))]

    both = data([a, b, a])
    assert len(set(both)) == 3  # a second copy goes another way
    assert data([b]) == [both[1]] and data([b, a]) == [both[1], both[0]]
    assert data([a], jax.random.key(4)) != [both[0]]
