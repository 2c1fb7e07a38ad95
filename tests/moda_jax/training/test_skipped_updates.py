import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.training.skipped_updates import UpdateCounts, choose_update


def follow(finite, limit):
    """Applies `choose_update` to a value that every sound step raises by one; what it is after each step."""
    step = jax.jit(lambda ok, counts, x: choose_update(ok, counts, jnp.where(ok, x + 1, jnp.nan), x, limit))
    value, counts, seen = jnp.float32(0), UpdateCounts.zero(), []
    for ok in finite:
        value, counts = step(ok, counts, value)
        seen.append((float(value), *(int(count) for count in jax.tree.leaves(counts))))
    return seen


def test_a_skipped_update_leaves_everything_and_counts():
    assert follow([True, False, False, True, False], limit=10) == [
        (1, 1, 0, 0), (1, 1, 1, 1), (1, 1, 2, 2), (2, 2, 2, 0), (2, 2, 3, 1),
    ]  # fmt: skip


def test_beyond_the_limit_nothing_changes_any_more():
    """The host reads a step late: a sound step behind the fault must not move the parameters away from it."""
    values = [value for value, *_ in follow([True, False, False, True, True], limit=1)]
    assert values == [1, 1, 1, 1, 1]
    assert follow([True, False, True], limit=0)[-1] == (1, 1, 2, 2)


def test_counts_add_up_to_the_steps():
    finite = np.random.default_rng(0).random(50) < 0.6
    for number, (value, updates, skipped, _) in enumerate(follow(finite, limit=50), 1):
        assert updates + skipped == number
        assert value == updates == finite[:number].sum()
