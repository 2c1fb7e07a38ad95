"""What is set before JAX meets a device, and that nothing that the user has set is changed."""

import os

import jax
import pytest
from support.documents import start_python

from moda_jax.training import runtime


@pytest.fixture
def clean(monkeypatch):
    for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield monkeypatch
    jax.config.update("jax_compilation_cache_dir", before)


def environment():
    return os.environ.get("XLA_FLAGS"), os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")


def test_a_gpu_gets_flags_and_memory(clean, tmp_path):
    clean.setattr(runtime, "_may_have_gpu", lambda: True)
    clean.setattr(runtime, "XLA_GPU_FLAGS", ("--xla_gpu_a=1", "--xla_gpu_b=2"))
    clean.setenv("XLA_FLAGS", "--xla_gpu_b=3 --xla_c=4")
    runtime.prepare(tmp_path)
    assert environment() == ("--xla_gpu_b=3 --xla_c=4 --xla_gpu_a=1", runtime.MEMORY_FRACTION)
    runtime.prepare(tmp_path, deterministic=True)
    assert environment()[0].split()[3:] == ["--xla_gpu_exclude_nondeterministic_ops=true"]
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")


def test_the_users_choices_stay(clean, tmp_path):
    clean.setattr(runtime, "_may_have_gpu", lambda: True)
    clean.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    runtime.prepare(tmp_path)
    assert environment()[1] == "0.5"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_without_a_gpu_the_environment_is_left_alone(clean, tmp_path):
    clean.setattr(runtime, "_may_have_gpu", lambda: False)
    clean.setattr(runtime, "XLA_GPU_FLAGS", ("--xla_gpu_a=1",))
    runtime.prepare(tmp_path)
    assert environment() == (None, None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Unable to initialize backend\nmore"), r" \(Unable to initialize backend\)"),
        (AssertionError(), ""),
    ],
)
def test_a_platform_without_a_device_is_named(monkeypatch, error, reason):
    def no_devices():
        raise error

    monkeypatch.setattr(jax, "devices", no_devices)
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", "cuda")
        with pytest.raises(ValueError, match=rf"JAX_PLATFORMS='cuda': JAX finds no such device{reason}; unset it"):
            runtime.require_device()
        jax.config.update("jax_platforms", None)
        with pytest.raises(type(error)):  # nobody asked for a platform: not the user's mistake
            runtime.require_device()
    finally:
        jax.config.update("jax_platforms", before)


def test_cuda_without_a_gpu_in_a_process_of_its_own():
    code = (
        "import os; os.environ |= {'JAX_PLATFORMS': 'cuda', 'CUDA_VISIBLE_DEVICES': ''}\n"
        "from moda_jax.training import runtime\n"
        "try: runtime.require_device()\n"
        "except ValueError as error: print(error)\n"
    )
    out, errors = start_python(code).communicate(timeout=120)
    assert out.startswith("JAX_PLATFORMS='cuda': JAX finds no such device"), errors
