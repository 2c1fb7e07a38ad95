"""Inference's jitted functions, compiled with the quick options: its tests cost compilation above all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import pytest
from support.quick_compile import QUICK

from moda_jax.inference import attention_maps, decode, scoring

DECODE = ("model", "num_steps", "sampling", "vocab_size", "implementation", "fused")
JITTED = (
    (decode, "prefill", ("model", "capacity", "padded"), ()),
    (decode, "step", ("model", "implementation", "fused"), ("cache",)),
    (decode, "decode", DECODE, ("state",)),
    (decode, "start", ("sampling", "vocab_size"), ("cache",)),
    (scoring, "target_log_probs", ("model", "vocab_size"), ()),
    (attention_maps, "_all_layers", ("model",), ()),
)


@contextlib.contextmanager
def quick_inference() -> Iterator[None]:
    """The same functions, static and donated arguments, other compiler options."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, static, donated in JITTED:
            function = getattr(module, name).__wrapped__
            quick = jax.jit(function, static_argnames=static, donate_argnames=donated, compiler_options=QUICK)
            patch.setattr(module, name, quick)
        yield
