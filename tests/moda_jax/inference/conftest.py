"""The tests of this folder cost compilation above all: the jitted functions are compiled with the quick options."""

from collections.abc import Iterator

import jax
import pytest
from support.quick_compile import QUICK

from moda_jax.inference import attention_maps, decode, scoring

DECODE = ("model", "num_steps", "sampling", "vocab_size", "products")
JITTED = (
    (decode, "prefill", ("model", "capacity", "padded"), ()),
    (decode, "step", ("model", "products"), ("cache",)),
    (decode, "decode", DECODE, ("state",)),
    (decode, "start", ("sampling", "vocab_size"), ("cache",)),
    (scoring, "target_log_probs", ("model", "vocab_size"), ()),
    (attention_maps, "_all_layers", ("model",), ()),
)


@pytest.fixture(scope="session", autouse=True)
def quick_compile() -> Iterator[None]:
    """The same functions, static and donated arguments, with the quick compiler options."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, static, donated in JITTED:
            function = getattr(module, name).__wrapped__
            quick = jax.jit(function, static_argnames=static, donate_argnames=donated, compiler_options=QUICK)
            patch.setattr(module, name, quick)
        yield
