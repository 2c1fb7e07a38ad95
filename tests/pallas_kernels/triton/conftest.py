"""These tests need the extra `triton`. Without it their files, which import triton, are left out, and
test_triton_extra.py says so. CI has a step that installs the extra, and fails where it is not there (.ci/run)."""

import importlib.metadata
from pathlib import Path

# Not by find_spec: this directory is a package of that name, as far as Python's path is concerned.
HAS_TRITON = any(True for _ in importlib.metadata.distributions(name="triton"))
collect_ignore = (
    []
    if HAS_TRITON
    else [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_triton_extra.py"]
)
