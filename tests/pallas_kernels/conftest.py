"""A fixture for tests of small shapes."""

import pytest

from pallas_kernels.xla import blocks


@pytest.fixture
def small_blocks(monkeypatch):
    """Short sequences span several blocks of the xla implementation, most of them ragged, whatever the device."""
    for platform in ("cpu", "gpu"):
        monkeypatch.setitem(blocks.LARGEST_BLOCK, platform, 32)
        monkeypatch.setitem(blocks.DEPTH, platform, 2**13)
