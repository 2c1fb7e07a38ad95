import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.numerics import cross_entropy
from moda_jax.numerics.cross_entropy import ALONE, loss_sums, projected_loss_sums


def projected(z_loss, *operands):
    """Of 11 tokens, on one device."""
    return projected_loss_sums(z_loss, 11, ALONE, *operands)


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


@pytest.mark.parametrize("scale", [1.0, 60.0], ids=["near logits", "far logits"])
@pytest.mark.parametrize("limit_bytes", [2**31, 3 * 4 * 11 * 4, 1], ids=["one chunk", "ragged chunks", "one by one"])
def test_projected_loss_equals_the_loss_of_all_logits(monkeypatch, limit_bytes, scale):
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", limit_bytes)
    _, targets, mask = example()
    random = np.random.default_rng(5)
    hidden = jnp.float32(random.normal(size=(3, 7, 5)))
    table = jnp.float32(scale * random.normal(size=(11, 5)))

    def plain(hidden, table):
        sums = loss_sums(jnp.einsum("btd,vd->btv", hidden, table, precision="highest"), targets, mask)
        return sums.loss + 0.1 * sums.z_loss, sums

    (objective, sums), gradients = jax.value_and_grad(
        lambda *a: projected(0.1, *a, targets, mask), argnums=(0, 1), has_aux=True
    )(hidden, table)
    (expected, expected_sums), expected_gradients = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(
        hidden, table
    )
    np.testing.assert_allclose(objective, expected, rtol=1e-6)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5 * scale)
    without_gradient = projected(0.1, hidden, table, targets, mask)
    np.testing.assert_allclose(without_gradient[1], expected_sums, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_the_projected_loss_in_narrow_dtypes(dtype):
    """Each within what rounding the softmax and the tokens to the dtype can do; most of these targets are unlikely."""
    _, targets, mask = example()
    random = np.random.default_rng(7)
    hidden = jnp.asarray(random.normal(size=(3, 7, 5)), dtype)
    table = jnp.asarray(4 * random.normal(size=(11, 5)), dtype).astype(jnp.float32)

    def gradients(hidden):
        return jax.grad(lambda *a: projected(1e-4, *a, targets, mask)[0], argnums=(0, 1))(hidden, table)

    for narrow, wide in zip(gradients(hidden), gradients(hidden.astype(jnp.float32)), strict=True):
        error = np.linalg.norm(np.float64(narrow) - np.float64(wide)) / np.linalg.norm(np.float64(wide))
        assert error < 2 * float(jnp.finfo(dtype).eps)


def test_projected_loss_of_no_targets():
    _, targets, mask = example()
    hidden, table = jnp.ones((3, 7, 5)), jnp.ones((11, 5))
    gradients = jax.grad(lambda *a: projected(0.1, *a, targets + 10**6, 0 * mask)[0], argnums=(0, 1))
    assert not any(np.any(gradient) for gradient in gradients(hidden, table))


def test_projected_loss_needs_memory_for_a_block_of_logits_only(monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 2**16)
    batch, tokens, width, vocabulary = 4, 512, 8, 1024  # all logits: 8 MB

    def objective(hidden, table):
        targets = jnp.zeros((batch, tokens), jnp.int32)
        return projected_loss_sums(0.1, vocabulary, ALONE, hidden, table, targets, jnp.ones((batch, tokens)))[0]

    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((batch, tokens, width), (vocabulary, width))]
    compiled = jax.jit(jax.value_and_grad(objective, argnums=(0, 1))).lower(*specs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * 2**16
