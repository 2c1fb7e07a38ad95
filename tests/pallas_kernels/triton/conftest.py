"""These tests need the extra `triton`; without it their files, which import triton, are left out, and pytest's header
says so. CI has a step for them that installs it and fails if it is not there (.ci/run)."""

import importlib.metadata

# Not by find_spec: this directory is a package of that name, as far as Python's path is concerned.
HAS_TRITON = any(True for _ in importlib.metadata.distributions(name="triton"))
collect_ignore_glob = [] if HAS_TRITON else ["test_*.py"]


def pytest_report_header() -> str | None:
    return None if HAS_TRITON else 'tests/pallas_kernels/triton: left out, since the extra "triton" is not installed'
