"""What others import, and what an editor shows them of it."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import moda_jax
import pallas_kernels

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("package", [moda_jax, pallas_kernels], ids=lambda package: package.__name__)
def test_every_public_name_is_there_with_its_arguments(package):
    for name in package.__all__:
        value = getattr(package, name)
        assert value.__doc__, name
        parameters = list(inspect.signature(value).parameters.values())
        assert parameters, name
        vague = [p.name for p in parameters if p.kind is p.VAR_KEYWORD or p.name == "args"]
        assert vague == [], name
        assert [p.name for p in parameters if p.annotation is p.empty] == [], name
        assert name in dir(package)


def test_the_layers_arguments_are_shown():
    signature = inspect.signature(moda_jax.MoDAAttention)
    assert list(signature.parameters)[:6] == [
        "width",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "ffn_kv",
        "attention_kv",
    ]
    assert signature.parameters["rope_theta"].default == 500000.0
    assert list(inspect.signature(moda_jax.Transformer).parameters) == ["config", "rngs"]


def test_a_subclass_shows_its_own_arguments():
    class Narrow(moda_jax.MoDAAttention):
        def __init__(self, size: int, *, rngs):
            super().__init__(size, 2, 1, 8, rngs=rngs)

    assert list(inspect.signature(Narrow).parameters) == ["size", "rngs"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'moda_jax' has no attribute 'laod'"):
        moda_jax.laod  # noqa: B018


def test_the_layer_alone_imports_nothing_of_runs():
    code = "import sys, moda_jax; print([m for m in ('orbax', 'grain', 'tokenizers', 'absl.app') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
