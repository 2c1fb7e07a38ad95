import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.numerics.loss_chunks import chunk_gradients, in_one_pass_if_representable, num_chunks


@pytest.mark.parametrize(
    ("tokens", "least", "expected"),
    [
        (4096, 1, 1),
        (4096, 3, 4),  # the next number that divides the tokens
        (12, 5, 6),
        (7, 2, 2),  # none from 2 to 3 does: the last block is padded
        (7, 4, 7),
        (7, 9, 7),  # no more blocks than tokens
        (1, 1, 1),
    ],
)
def test_examples(tokens, least, expected):
    assert num_chunks(tokens, least) == expected


def test_never_fewer_than_asked_for_nor_twice_as_many_and_padding_only_where_it_must_be():
    for tokens in range(1, 40):
        for least in range(1, 45):
            count, wanted = num_chunks(tokens, least), min(least, tokens)
            assert wanted <= count < 2 * wanted
            divisors = [n for n in range(wanted, 2 * wanted) if tokens % n == 0]
            assert count == (divisors[0] if divisors else wanted)


def gradients(logits, targets, mask, *, normalise_first=False, dtype=jnp.float32):
    """(sums, d objective / d logits, representable) with z_loss = 0.1."""
    sums, factor, weight, fits = chunk_gradients(
        0.1, jnp.float32(logits), jnp.int32(targets), jnp.float32(mask), dtype, normalise_first=normalise_first
    )
    return sums, np.float64(factor) * np.float64(weight), bool(fits)


@pytest.mark.parametrize("normalise_first", [False, True])
def test_gradients_of_a_block(normalise_first):
    logits = np.random.default_rng(0).normal(size=(5, 7)) * 4
    logits[:, 6] = -np.inf  # padding
    targets, mask = [3, 0, 99, 5, 1], [1, 1, 0, 1, 0]
    sums, gradient, fits = gradients(logits, targets, mask, normalise_first=normalise_first)
    assert fits
    log_z = np.log(np.sum(np.exp(logits), axis=-1))
    expected = np.exp(logits - log_z[:, None]) * (1 + 0.2 * log_z[:, None])
    for row, target in enumerate(targets):
        if mask[row]:
            expected[row, target] -= 1
    np.testing.assert_allclose(gradient, expected * np.array(mask)[:, None], rtol=1e-4, atol=1e-6)
    chosen = [logits[row, target] if mask[row] else 0.0 for row, target in enumerate(targets)]
    np.testing.assert_allclose(sums, [np.sum(mask * (log_z - chosen)), np.sum(mask * log_z**2), 3], rtol=1e-5)


@pytest.mark.parametrize(("loss", "fits"), [(50.0, True), (60.0, False), (400.0, False)])
def test_targets_that_are_too_unlikely_are_noticed(loss, fits):
    logits = [[0.0, loss]]
    assert gradients(logits, [0], [1])[2] is fits
    assert gradients(logits, [0], [0])[2]  # it does not count
    sums, gradient, representable = gradients(logits, [0], [1], normalise_first=True)
    assert representable
    assert float(sums.loss) == loss
    np.testing.assert_allclose(gradient, [[-1, 1 + 0.2 * loss]], rtol=1e-6)


def test_a_column_on_another_device_is_left_alone():
    _, gradient, _ = gradients([[1.0, 2.0]], [-1], [1], normalise_first=True)
    assert (gradient > 0).all()


def test_what_cannot_be_represented_is_computed_again():
    def compute(normalise_first, fits):
        return jnp.float32(normalise_first), jnp.bool(fits)

    for fits, dtype, again in ((True, "bfloat16", 0), (False, "bfloat16", 1), (True, "float16", 1)):
        assert in_one_pass_if_representable(lambda first, fits=fits: compute(first, fits), jnp.dtype(dtype)) == again
