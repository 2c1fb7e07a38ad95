import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax.config import CheckpointConfig, OptimizerConfig
from moda_jax.training.checkpoint import CheckpointError, Checkpoints, check_step, saved_steps
from moda_jax.training.optimizer import make_optimizer
from moda_jax.training.state import TrainState

# After an error of its own, Orbax leaves a task behind that finds its event loop closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

OPTIMIZER = make_optimizer(OptimizerConfig(), 10**5)


def new_state(seed=0, step=0):
    random = np.random.default_rng(seed)
    params = {
        "embedding": {"table": jnp.float32(random.normal(size=(5, 3)))},
        "head": {"kernel": jnp.float32(random.normal(size=(3, 5)))},
    }
    optimizer_state = OPTIMIZER.init(params)
    return TrainState(jnp.int32(step), params, optimizer_state, jax.random.key(seed))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = (jax.random.key_data(v) if jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in (x, y))
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def opened(tmp_path):
    """Opens managers on one directory, as runs one after the other do, and closes them."""
    managers = []

    def open_(**fields):
        for manager in managers:
            manager.close()
        managers.append(Checkpoints(tmp_path / "checkpoints", CheckpointConfig(**fields)))
        return managers[-1]

    open_.directory = tmp_path / "checkpoints"
    yield open_
    managers[-1].close()


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, new_state(seed=step, step=step), {"step": step, "data_position": 4 * step})
    checkpoints.wait()


def test_what_was_saved_comes_back(opened):
    save(opened(), 3)
    state, record = opened().restore(3, abstract(new_state()))
    assert_equal(state, new_state(seed=3, step=3))
    assert record == {"step": 3, "data_position": 12}


def test_a_state_may_be_donated_right_after_the_save(opened):
    checkpoints = opened()
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {"kernel": jnp.zeros((1000, 1000))}
    for step in range(1, 4):
        tree = add(tree)
        checkpoints.save(step, tree, {})
        tree = add(tree)
        tree = jax.tree.map(lambda x: x - 1, tree)
    checkpoints.wait()
    for step in saved_steps(opened.directory):
        np.testing.assert_array_equal(checkpoints.restore(step, abstract(tree))[0]["kernel"], step)


def test_retention(opened):
    save(opened(keep_last=2, keep_every_steps=4), *range(1, 11))
    assert saved_steps(opened.directory) == [10, 9, 8, 4]


def test_saved_steps_creates_nothing(tmp_path):
    assert saved_steps(tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
    (tmp_path / "some" / "7").mkdir(parents=True)
    (tmp_path / "some" / "8.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "some" / "9").touch()
    assert saved_steps(tmp_path / "some") == [7]


def test_tensors_that_differ_are_named(opened):
    save(opened(), 1)
    expected = abstract(new_state())
    params = {
        "embedding": {"table": jax.ShapeDtypeStruct((6, 3), jnp.float32)},
        "head": {"kernel": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)},
        "extra": {"scale": jax.ShapeDtypeStruct((2,), jnp.float32)},
    }
    wrong = TrainState(expected.step, params, expected.optimizer_state, expected.key)
    with pytest.raises(CheckpointError) as error:
        opened().restore(1, wrong)
    assert str(error.value).splitlines()[1:] == [
        "  params.embedding.table: float32[5, 3], expected float32[6, 3]",
        "  params.extra.scale: missing",
        "  params.head.kernel: float32[3, 5], expected bfloat16[3, 5]",
    ]
    less = TrainState(expected.step, {"head": expected.params["head"]}, expected.optimizer_state, expected.key)
    with pytest.raises(CheckpointError, match=r"params\.embedding\.table: not expected"):
        opened().restore(1, less)


def test_an_empty_directory_is_no_checkpoint(opened):
    save(opened(), 1)
    (opened.directory / "9").mkdir()
    assert saved_steps(opened.directory) == [9, 1]
    check_step(opened.directory, 1)
    with pytest.raises(
        CheckpointError, match=r"checkpoints/9: not a complete checkpoint, _CHECKPOINT_METADATA, .* missing"
    ):
        check_step(opened.directory, 9)


def test_a_damaged_step_is_an_error_that_names_it(opened):
    save(opened(), 1)
    shutil.rmtree(opened.directory / "1" / "state" / "ocdbt.process_0")
    (opened.directory / "1" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoints/1: cannot be restored"):
        opened().restore(1, abstract(new_state()))


def test_saving_a_step_twice_is_an_error(opened):
    checkpoints = opened()
    save(checkpoints, 1)
    with pytest.raises(ValueError, match="step 1 already exists"):
        save(checkpoints, 1)
