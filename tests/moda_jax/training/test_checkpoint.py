import errno
import logging
import re
import shutil
import socket
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.documents import start_python

from moda_jax.config import CheckpointConfig, OptimizerConfig
from moda_jax.exit_codes import RunStoppedError
from moda_jax.parallel.parameters import pad_vocabulary
from moda_jax.parameter import ParameterKind, ParameterKinds
from moda_jax.training import checkpoint
from moda_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    check_step,
    find_good_step,
    main,
    newest_good_step,
    saved_steps,
    steps_to_delete,
)
from moda_jax.training.checksums import write_manifest
from moda_jax.training.optimizer import make_optimizer
from moda_jax.training.state import TrainState

# After an error of its own, Orbax leaves a task behind that finds its event loop closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

KINDS = ParameterKinds((
    ("embedding.table", ParameterKind(("vocabulary", "width"))),
    ("head.kernel", ParameterKind(("width", "vocabulary"), decays=True)),
))  # fmt: skip
OPTIMIZER = make_optimizer(OptimizerConfig(), 10**5, KINDS)


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
    assert record == {"step": 3, "data_position": 12, "format": 2}


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


def test_what_an_older_checkpoint_lacks_is_zero(opened):
    save(opened(), 1)
    older = abstract(new_state())
    wanted = jax.eval_shape(lambda state: pad_vocabulary(state, KINDS, 8), older)
    state, _ = opened().restore(1, wanted, older=older)
    assert_equal(state, pad_vocabulary(new_state(seed=1, step=1), KINDS, 8))
    assert state.params["embedding"]["table"].shape == (8, 3)
    assert state.optimizer_state[1].mu["head"]["kernel"].shape == (3, 8)
    with pytest.raises(CheckpointError, match=r"params\.embedding\.table: float32\[5, 3\], expected float32\[8, 3\]"):
        opened().restore(1, wanted)


def files_of(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [flip_a_bit, truncate, empty, Path.unlink])
def test_every_file_in_turn_is_missed_when_it_is_spoiled(opened, spoil):
    """Detected each time by its name, the step before is the good one, and `restore` does not load the spoiled one."""
    checkpoints = opened()
    save(checkpoints, 1, 2)
    place, expected = opened.directory / "2", abstract(new_state())
    names = files_of(place)
    assert len(names) >= 10 and "CHECKSUMS" in names
    for name in names:
        content = (place / name).read_bytes()
        assert content, f"{name} is empty as it is: truncating it would change nothing"
        spoil(place / name)
        step, ((skipped, reason),) = newest_good_step(opened.directory)
        assert (step, skipped) == (1, 2), name
        assert reason.startswith(name), reason
        assert_equal(checkpoints.restore(step, expected)[0], new_state(seed=1, step=1))
        with pytest.raises(CheckpointError, match=rf"checkpoints/2: {re.escape(name)}"):
            checkpoints.restore(2, expected)
        (place / name).write_bytes(content)
        assert newest_good_step(opened.directory) == (2, [])
    assert_equal(checkpoints.restore(2, expected)[0], new_state(seed=2, step=2))


def test_an_empty_directory_is_no_checkpoint(opened):
    save(opened(), 1)
    (opened.directory / "9").mkdir()
    assert saved_steps(opened.directory) == [9, 1]
    check_step(opened.directory, 1)
    with pytest.raises(CheckpointError, match=r"checkpoints/9: CHECKSUMS missing: not a complete checkpoint"):
        check_step(opened.directory, 9)
    assert newest_good_step(opened.directory)[0] == 1


def test_what_an_interrupted_save_left_is_no_step_and_goes_away(opened, caplog):
    save(opened(), 1)
    leftovers = ["2.saving.orbax-checkpoint-tmp", "3.saving", "4.orbax-checkpoint-tmp", "5.deleting"]
    for name in leftovers:
        shutil.copytree(opened.directory / "1", opened.directory / name)
    for name in ("6.damaged", "notes"):
        (opened.directory / name).mkdir()
    assert newest_good_step(opened.directory) == (1, [])
    with caplog.at_level(logging.WARNING, "moda_jax"):
        opened()
    assert sorted(path.name for path in opened.directory.iterdir()) == ["1", "6.damaged", "notes"]
    assert all(f"{name}: removing what an interrupted process left" in caplog.text for name in leftovers)


def test_without_a_good_step_nothing_is_begun_anew(opened):
    save(opened(keep_last=3), 1, 2)
    flip_a_bit(opened.directory / "2" / "state" / "manifest.ocdbt")
    (opened.directory / "1" / "CHECKSUMS").unlink()
    with pytest.raises(CheckpointError, match="no saved step is good") as error:
        newest_good_step(opened.directory)
    lines = str(error.value).splitlines()[1:]
    assert lines[0].startswith("  2: state/manifest.ocdbt: its content has changed")
    assert lines[1] == (
        "  1: CHECKSUMS missing: removed, or written by a version before checkpoint format 2, which had none"
    )
    assert find_good_step(opened.directory) == (None, [(int(line[2]), line[5:]) for line in lines])
    assert newest_good_step(opened.directory / "none") == find_good_step(opened.directory / "none") == (None, [])


def test_steps_set_aside_can_be_saved_again(opened):
    checkpoints = opened()
    save(checkpoints, 1)
    for _ in range(2):
        (opened.directory / "5").mkdir()
        checkpoints.set_aside([5])
    save(checkpoints, 5)
    assert newest_good_step(opened.directory) == (5, [])
    assert {path.name for path in opened.directory.iterdir()} == {"1", "5", "5.damaged", "5.damaged-2"}


def test_another_format_is_refused(opened, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    save(opened(), 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"checkpoints/1: has format 3, this version reads 2"):
        opened().restore(1, abstract(new_state()))


@pytest.mark.parametrize("keep_last", [1, 2])
def test_retention_never_gives_up_the_newest(keep_last):
    config = CheckpointConfig(keep_last=keep_last, keep_every_steps=4)
    assert steps_to_delete([1], config) == []
    assert steps_to_delete([3, 1, 4, 2, 5], config) == {1: [3, 2, 1], 2: [3, 2, 1]}[keep_last]
    assert steps_to_delete(range(1, 10), CheckpointConfig(keep_last=keep_last)) == list(range(9 - keep_last, 0, -1))


class TestFailedSaves:
    """A save fails because something stands where Orbax wants to write; real full disks have their own test."""

    @pytest.fixture
    def spoiled(self, opened, monkeypatch):
        """Opens checkpoints whose first `failures` commits fail."""

        def open_(failures, **fields):
            checkpoints, left = opened(**fields), iter(range(failures))

            def write(directory):
                if next(left, None) is not None:
                    raise OSError(errno.ENOSPC, "No space left on device", str(directory))
                write_manifest(directory)

            monkeypatch.setattr(checkpoint, "write_manifest", write)
            return checkpoints

        return open_

    def save(self, checkpoints, step):
        checkpoints.save(step, new_state(seed=step, step=step), {})

    def test_former_steps_stay_and_the_next_one_succeeds(self, opened, spoiled, caplog):
        save(opened(keep_last=1), 1)
        checkpoints = spoiled(2, keep_last=1)
        for step in (2, 3):
            self.save(checkpoints, step)
            assert not checkpoints.wait()
            assert [path.name for path in opened.directory.iterdir()] == ["1"]  # not even a leftover
        assert "NOT SAVED at step 3 (failure 2 of at most 3 in a row; the newest checkpoint is that of" in caplog.text
        assert "No space left on device" in caplog.text
        self.save(checkpoints, 4)
        assert checkpoints.wait()
        assert newest_good_step(opened.directory) == (4, [])

    def test_too_many_in_a_row_are_an_error(self, opened, spoiled):
        checkpoints = spoiled(3, max_failed_saves=2)
        self.save(checkpoints, 1)
        with pytest.raises(RunStoppedError, match=r"the last 2 saves have failed .* there is no checkpoint yet"):
            for step in (2, 3):
                self.save(checkpoints, step)
        save(opened(), 9)

    def test_a_failure_is_reported_without_waiting_for_the_next_save(self, spoiled, caplog):
        checkpoints = spoiled(1)
        self.save(checkpoints, 1)
        deadline = time.monotonic() + 60
        while "NOT SAVED" not in caplog.text and time.monotonic() < deadline:
            checkpoints.poll()
        assert "CHECKPOINT NOT SAVED at step 1" in caplog.text


def test_verify_speaks_to_people(opened, capsys):
    save(opened(keep_last=3), 1, 2)
    workdir = opened.directory.parent
    assert main(["verify", str(workdir)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("step 2: good, ") and "latest good step: 2 (" in out
    empty(opened.directory / "2" / "meta" / "metadata")
    (opened.directory / "4.saving").mkdir()
    assert main(["verify", str(workdir)]) == 1
    out = capsys.readouterr().out
    assert "step 2: NOT GOOD, meta/metadata: has 0 bytes, was written with" in out
    assert "4.saving: not a saved step" in out and "latest good step: 1 (" in out
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(workdir / "none")])
    assert ended.value.code == 2 and "holds no checkpoints/" in capsys.readouterr().err


def test_saving_a_step_twice_is_an_error(opened):
    checkpoints = opened()
    save(checkpoints, 1)
    with pytest.raises(ValueError, match="step 1 already exists"):
        save(checkpoints, 1)


GROUP = """
import errno, sys
from pathlib import Path
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from moda_jax.config import CheckpointConfig
from moda_jax.training import checkpoint
from moda_jax.exit_codes import RunStoppedError

write, failing = checkpoint.write_manifest, {2, 4, 5}

def write_or_fail(directory):
    if int(directory.name.partition(".")[0]) in failing:
        raise OSError(errno.ENOSPC, "No space left on device")
    write(directory)

checkpoint.write_manifest = write_or_fail
checkpoints = checkpoint.Checkpoints(Path(sys.argv[3]), CheckpointConfig(max_failed_saves=2))
try:
    for step in range(1, 7):
        checkpoints.save(step, {"kernel": np.full((4,), step, np.float32)}, {"step": step})
        checkpoints.poll()
        print(step, checkpoints.wait(), flush=True)
except RunStoppedError as error:
    print("stopped after", step, flush=True)
checkpoints.close()
"""


def test_all_processes_learn_of_a_save_that_failed_in_one(tmp_path):
    """The first process writes the checksums; the other must not go on as if they were there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    group = [start_python(GROUP, address, index, tmp_path / "checkpoints") for index in range(2)]
    try:
        answers = [process.communicate(timeout=200) for process in group]
    finally:
        for process in group:
            process.kill()
    for out, errors in answers:
        assert out.splitlines()[-5:] == ["1 True", "2 False", "3 True", "4 False", "stopped after 5"], errors
    assert newest_good_step(tmp_path / "checkpoints") == (3, [])
