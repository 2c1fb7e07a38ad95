"""The tests of this folder compile inference's functions with the quick options."""

from collections.abc import Iterator

import pytest
from support.quick_inference import quick_inference


@pytest.fixture(scope="session", autouse=True)
def quick_compile() -> Iterator[None]:
    with quick_inference():
        yield
