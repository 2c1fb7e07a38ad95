"""The dispatch table: names, what is missing, and the choice for None."""

import logging
import re
import sys
import types

import jax
import numpy as np
import pytest

from pallas_kernels import dispatch, moda_attention
from pallas_kernels.operands import Call, DepthKV, Mask
from pallas_kernels.parts import Part
from pallas_kernels.triton import versions

CALL = Call(*(np.zeros((1, 4, 2, 8), np.float32) for _ in range(3)))


def _arrays():
    return tuple(np.zeros((1, 4, 2, 8), np.float32) for _ in range(3))


def _module(refusal: str | None = None, leave_out: str = "") -> types.ModuleType:
    """A complete implementation that supports every call, or none for the reason given."""
    module = types.ModuleType("fake")

    def check_supported(call):
        del call
        if refusal:
            raise NotImplementedError(refusal)

    for operation in dispatch.OPERATIONS:
        setattr(module, operation, check_supported if operation == "check_supported" else (lambda *a, **k: None))
    if leave_out:
        delattr(module, leave_out)
    return module


@pytest.fixture
def hopper(monkeypatch):
    """A device of compute capability 9.0, with the kernels proved; the log's memory is fresh."""
    monkeypatch.setattr(dispatch, "PREFERENCES", (("mosaic_gpu", ("9.0",)),))
    monkeypatch.setattr(dispatch, "_device", lambda: ("gpu", "9.0"))
    dispatch._log_choice.cache_clear()


def test_an_unknown_name_is_a_value_error():
    with pytest.raises(ValueError, match=r"implementation='flash': expected None or one of .*mosaic_gpu"):
        moda_attention(*_arrays(), implementation="flash")


def test_a_name_that_is_not_there_yet_says_so(monkeypatch):
    monkeypatch.setitem(dispatch.MODULES, "triton", "pallas_kernels.not_written_yet")
    with pytest.raises(NotImplementedError, match="'triton' is not in this version"):
        moda_attention(*_arrays(), implementation="triton")


def test_a_missing_requirement_of_an_implementation_is_named(monkeypatch, tmp_path):
    (tmp_path / "needs_more.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(dispatch.MODULES, "triton", "needs_more")
    with pytest.raises(NotImplementedError, match="'triton' needs a_package_that_nobody_has"):
        moda_attention(*_arrays(), implementation="triton")


def test_an_incomplete_implementation_says_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, dispatch.MODULES["triton"], _module(leave_out="backward"))
    with pytest.raises(NotImplementedError, match="'triton' is not complete: it lacks backward"):
        moda_attention(*_arrays(), implementation="triton")


def test_a_named_implementation_never_falls_back(monkeypatch):
    monkeypatch.setitem(sys.modules, dispatch.MODULES["mosaic_gpu"], _module("no head_dim of 8"))
    with pytest.raises(NotImplementedError, match="no head_dim of 8"):
        moda_attention(*_arrays(), implementation="mosaic_gpu")


def test_none_is_xla_on_a_cpu_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_device", lambda: ("cpu", None))
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(2):
            assert dispatch.resolve(None, CALL) == "xla"
    assert [record.getMessage() for record in caplog.records] == ["attention implementation: xla (platform cpu)"]


def test_none_is_the_kernel_where_it_supports_the_call(monkeypatch, caplog, hopper):
    monkeypatch.setitem(sys.modules, dispatch.MODULES["mosaic_gpu"], _module())
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        assert dispatch.resolve(None, CALL) == "mosaic_gpu"
    assert "compute capability 9.0" in caplog.text


def test_none_says_why_the_kernel_is_not_it(monkeypatch, caplog, hopper):
    monkeypatch.setitem(sys.modules, dispatch.MODULES["mosaic_gpu"], _module("no float32"))
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        assert dispatch.resolve(None, CALL) == "xla"
    assert "no float32" in caplog.text


def test_every_implementation_of_a_device_is_tried_in_order(monkeypatch, caplog, hopper):
    monkeypatch.setattr(dispatch, "PREFERENCES", (("mosaic_gpu", ("9.0",)), ("triton", ("8.0", "9.0"))))
    monkeypatch.setitem(sys.modules, dispatch.MODULES["mosaic_gpu"], _module("no float32"))
    monkeypatch.setitem(sys.modules, dispatch.MODULES["triton"], _module())
    assert dispatch.preferred() == ("mosaic_gpu", "triton")
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        assert dispatch.resolve(None, CALL) == "triton"
        monkeypatch.setitem(sys.modules, dispatch.MODULES["triton"], _module("no GPU for it"))
        assert dispatch.resolve(None, CALL) == "xla"
    assert "xla (triton does not support the call: no GPU for it)" in caplog.text
    monkeypatch.setattr(dispatch, "_device", lambda: ("gpu", "8.0"))
    assert dispatch.preferred() == ("triton",)
    monkeypatch.setattr(dispatch, "_device", lambda: ("cpu", None))
    assert dispatch.preferred() == ()


def test_what_an_implementation_is_told_about_a_call(monkeypatch):
    told = []
    module = _module()
    module.check_supported = told.append
    module.forward = lambda call, with_rest: Part(call.query, call.query[..., 0])
    monkeypatch.setitem(sys.modules, dispatch.MODULES["mosaic_gpu"], module)
    query = np.zeros((2, 5, 6, 8), np.float32)
    key, depth = np.zeros((2, 5, 3, 8), np.float32), np.zeros((2, 5, 7, 3, 8), np.float32)
    ids = np.zeros((2, 5), np.int32)
    moda_attention(query, key, key, depth, depth, segment_ids=ids, scale=0.5, implementation="mosaic_gpu")
    expected = Call(query, key, key, Mask(True, None, None, ids, ids), DepthKV(depth, depth), 0.5)
    assert jax.tree.structure(told[0]) == jax.tree.structure(expected)
    assert jax.tree.map(np.shape, told[0]) == jax.tree.map(np.shape, expected)
    assert (told[0].num_kv_heads, told[0].slots, told[0].sees_slots) == (3, 7, True)


def test_a_gpu_whose_kernels_are_not_installed_is_warned_once_with_the_extra(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_device", lambda: ("gpu", "8.6"))
    dispatch._log_choice.cache_clear()
    monkeypatch.setattr(versions, "_installed", lambda name: None)
    monkeypatch.delitem(sys.modules, dispatch.MODULES["triton"], raising=False)
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(2):
            assert dispatch.resolve(None, CALL) == "xla"
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "needs jax-triton and triton, which is not installed: pip install 'moda-jax[triton]'" in record.getMessage()


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({"jax-triton": "0.3.1", "triton": "3.7.0"}, "tested with jax-triton 0.3.1 and triton 3.6, and here are "
         "jax-triton 0.3.1 and triton 3.7.0"),
        ({"jax-triton": "0.4.1", "triton": "3.6.0"}, "here are jax-triton 0.4.1 and triton 3.6.0"),
        ({"jax-triton": "0.3.1", "triton": "3.60"}, "here are jax-triton 0.3.1 and triton 3.60"),
        ({"triton": "3.6.0"}, "needs jax-triton, which is not installed"),
    ],
)  # fmt: skip
def test_another_pair_than_the_tested_one_is_refused_by_both_numbers(monkeypatch, installed, message):
    monkeypatch.setattr(versions, "_installed", installed.get)
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        versions.check()


@pytest.mark.parametrize("triton", ["3.6.0", "3.6", "3.6.1+local"])
def test_the_tested_pair_is_accepted(monkeypatch, triton):
    monkeypatch.setattr(versions, "_installed", {"jax-triton": "0.3.1", "triton": triton}.get)
    versions.check()
