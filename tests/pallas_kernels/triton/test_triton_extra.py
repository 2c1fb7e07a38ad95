"""The extra `triton`: is it here, and is it the pair that the other tests of this directory are about?"""

import importlib.metadata

import pytest

from pallas_kernels.triton import versions


def test_what_is_installed_is_the_tested_pair():
    if not any(True for _ in importlib.metadata.distributions(name="triton")):
        pytest.skip('the extra "triton" is not installed: all tests of this directory are left out')
    versions.check()
    import triton

    assert triton.__version__.startswith(versions.TRITON)
    assert hasattr(triton, "jit"), "the directory of the tests was imported in its place"
