import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.training.loss import loss_sums


def oracle(logits, targets, mask):
    """Loops in float64: the sums of -log p(target), of log(Z)^2, and of the mask."""
    loss = z_loss = count = 0.0
    for b in range(targets.shape[0]):
        for t in range(targets.shape[1]):
            if mask[b, t] == 0:
                continue
            row = np.asarray(logits[b, t], np.float64)
            largest = row.max()
            log_z = largest + np.log(np.sum(np.exp(row - largest)))
            loss += log_z - row[targets[b, t]]
            z_loss += log_z**2
            count += 1
    return loss, z_loss, count


def example(seed=0, scale=3.0):
    random = np.random.default_rng(seed)
    logits = (scale * random.normal(size=(3, 7, 11))).astype(np.float32)
    targets = random.integers(0, 11, size=(3, 7)).astype(np.int32)
    mask = (random.random(size=(3, 7)) < 0.6).astype(np.float32)
    return logits, targets, mask


@pytest.mark.parametrize("scale", [0.0, 3.0, 300.0])
def test_sums_equal_a_float64_loop(scale):
    logits, targets, mask = example(scale=scale)
    np.testing.assert_allclose(loss_sums(logits, targets, mask), oracle(logits, targets, mask), rtol=1e-6)


def test_what_stands_where_the_mask_is_zero_does_not_matter():
    logits, targets, mask = example()
    spoiled = np.where(mask > 0, targets, 10**6)
    assert loss_sums(logits, targets, mask) == loss_sums(logits, spoiled, mask)


def test_narrow_logits_are_widened_before_the_softmax():
    logits, targets, mask = example()
    narrow = jnp.asarray(logits, jnp.bfloat16)
    sums = loss_sums(narrow, targets, mask)
    assert all(value.dtype == jnp.float32 for value in sums)
    np.testing.assert_allclose(sums, oracle(narrow.astype(jnp.float32), targets, mask), rtol=1e-6)


def test_no_targets_give_zero_and_a_zero_gradient():
    logits, targets, mask = example()
    zeros = np.zeros_like(mask)
    assert [float(value) for value in loss_sums(logits, targets, zeros)] == [0.0, 0.0, 0.0]
    gradient = jax.grad(lambda x: loss_sums(x, targets, zeros).loss + loss_sums(x, targets, zeros).z_loss)(logits)
    assert not np.any(gradient)


def test_gradient_is_softmax_minus_one_hot():
    logits, targets, mask = example()
    gradient = jax.grad(lambda x: loss_sums(x, targets, mask).loss)(logits)
    wide = logits.astype(np.float64)
    softmax = np.exp(wide - wide.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    expected = (softmax - np.eye(11)[targets]) * mask[..., None]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
