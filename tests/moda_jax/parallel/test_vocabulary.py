"""Look-up and loss as the mesh computes them, on a mesh of one device; `test_sharded_training` has those of many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from moda_jax.numerics import cross_entropy
from moda_jax.numerics.cross_entropy import projected_loss_sums
from moda_jax.parallel import vocabulary
from moda_jax.parallel.mesh import AXES, on_mesh

BATCH, TOKENS, WIDTH, VOCABULARY, ROWS = 3, 7, 5, 11, 16  # 5 rows of padding


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def example():
    """(hidden, table, targets, mask); the table's padding is not zero, and must not matter."""
    random = np.random.default_rng(0)
    hidden = random.normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)
    table = random.normal(size=(ROWS, WIDTH)).astype(np.float32)
    mask = (random.random(size=(BATCH, TOKENS)) < 0.6).astype(np.float32)
    targets = random.integers(0, VOCABULARY, size=(BATCH, TOKENS)).astype(np.int32)
    return hidden, table, np.where(mask > 0, targets, 10**6).astype(np.int32), mask


def oracle(z_loss, hidden, table, targets, mask):
    """Loops in float64: the sums, and the gradients of loss + z_loss * (sum of log(Z)^2)."""
    hidden, table = hidden.astype(np.float64), table.astype(np.float64)
    sums, dhidden, dtable = np.zeros(3), np.zeros_like(hidden), np.zeros_like(table)
    for b in range(BATCH):
        for t in range(TOKENS):
            if mask[b, t] == 0:
                continue
            logits = table[:VOCABULARY] @ hidden[b, t]
            log_z = np.logaddexp.reduce(logits)
            sums += (log_z - logits[targets[b, t]], log_z**2, 1)
            dlogits = np.exp(logits - log_z) * (1 + 2 * z_loss * log_z)
            dlogits[targets[b, t]] -= 1
            dhidden[b, t] = dlogits @ table[:VOCABULARY]
            dtable[:VOCABULARY] += np.outer(dlogits, hidden[b, t])
    return sums, dhidden, dtable


@pytest.mark.parametrize(
    ("chunks", "limit_bytes"),
    [(1, 2**31), (7, 4 * ROWS * 4), (2, 700), (7, 1)],
    ids=["one chunk", "chunks that divide", "ragged chunks", "one by one"],
)
def test_loss_and_gradients_equal_a_float64_loop(mesh, example, monkeypatch, chunks, limit_bytes):
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", limit_bytes)
    hidden, table, targets, mask = example

    def objective(hidden, table):
        return projected_loss_sums(0.1, VOCABULARY, vocabulary.loss_exchange(), hidden, table, targets, mask)

    function = on_mesh(mesh, jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (total, sums), (dhidden, dtable) = jax.jit(function)(hidden, table)
    expected, expected_dhidden, expected_dtable = oracle(0.1, *example)
    np.testing.assert_allclose(sums, expected, rtol=1e-6)
    np.testing.assert_allclose(total, expected[0] + 0.1 * expected[1], rtol=1e-6)
    np.testing.assert_allclose(dhidden, expected_dhidden, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dtable, expected_dtable, rtol=1e-5, atol=1e-6)
    assert (f"length={chunks}" in str(jax.make_jaxpr(function)(hidden, table))) == (chunks > 1)
    np.testing.assert_allclose(jax.jit(on_mesh(mesh, objective))(hidden, table)[1], expected, rtol=1e-6)


def test_targets_that_are_too_unlikely_for_one_pass(mesh, example):
    hidden, table, targets, mask = example
    hidden = 40 * hidden

    def objective(hidden, table):
        return projected_loss_sums(0.1, VOCABULARY, vocabulary.loss_exchange(), hidden, table, targets, mask)[0]

    gradients = jax.jit(on_mesh(mesh, jax.grad(objective, argnums=(0, 1))))(hidden, table)
    sums, *expected = oracle(0.1, hidden, table, targets, mask)
    assert sums[0] / sums[2] > 55
    for got, want in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_lookup_and_its_gradient(mesh, example):
    _, table, _, _ = example
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, size=(BATCH, TOKENS)).astype(np.int32)
    weights = np.random.default_rng(2).normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)

    def total(table):
        found = vocabulary.lookup(table, tokens, jnp.float32)
        return jnp.sum(found * weights), found

    (_, found), gradient = jax.jit(on_mesh(mesh, jax.value_and_grad(total, has_aux=True)))(table)
    np.testing.assert_array_equal(found, table[tokens])
    expected = np.zeros(table.shape)
    for b in range(BATCH):
        for t in range(TOKENS):
            expected[tokens[b, t]] += weights[b, t]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)
