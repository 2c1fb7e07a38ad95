"""An array in a file: what it returns, and what becomes of a file that is cut off."""

import pickle

import numpy as np
import pytest

from moda_jax.data.file_array import FileArray
from moda_jax.data.file_guard import DataLostError


@pytest.fixture(params=[0, 1, 700, 5000])
def both(request, tmp_path):
    array = np.sort(np.random.default_rng(0).integers(0, 3000, request.param))
    np.save(tmp_path / "a.npy", array)
    return FileArray(tmp_path / "a.npy"), array


def test_reads_as_numpy_does(both):
    found, array = both
    assert (len(found), found.dtype, found.shape) == (len(array), array.dtype, array.shape)
    for part in (slice(None), slice(3, 600), slice(-5, None), slice(9, 2), slice(4000, 9000)):
        np.testing.assert_array_equal(found[part], array[part])
    np.testing.assert_array_equal(np.asarray(found, np.float64), array)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)), array)
    if len(array):
        assert found[-1] == array[-1] and found[0] == array[0]
    for side in ("left", "right"):
        for value in (-1, 0, 1, 1234, 2999, 3000, *array[:: max(1, len(array) // 50)].tolist()):
            assert found.searchsorted(value, side) == array.searchsorted(value, side)
    with pytest.raises(IndexError, match=f"expected one of {len(array)}"):
        found[len(array)]
    for index in (slice(None, None, 2), array % 2 == 0, np.arange(len(array) // 2)):
        np.testing.assert_array_equal(found[index], array[index])


def test_a_file_that_becomes_shorter_is_named(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(10_000))
    found = FileArray(path)
    with path.open("r+b") as file:
        file.truncate(20_000)
    np.testing.assert_array_equal(found[100:200], np.arange(100, 200))
    with pytest.raises(DataLostError, match=r"a\.npy: was changed while the run read it: it ends before number 9000"):
        found[5000:9000]
    path.unlink()
    np.testing.assert_array_equal(found[:3], np.arange(3))


def test_what_is_no_such_array_is_refused(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"a\.npy: holds float64 \(2, 3\), expected numbers in one dimension"):
        FileArray(path)
    path.write_bytes(b"nothing of that kind")
    with pytest.raises(ValueError, match=r"a\.npy: not an array that can be read"):
        FileArray(path)
    np.save(path, np.arange(100))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"a\.npy: 920 bytes are too few for 100 x int64"):
        FileArray(path)
