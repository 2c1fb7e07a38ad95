"""The products of a decode step: the kernel, interpreted and on the chip, and XLA's form, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, matvec
from pallas_kernels.mosaic_gpu import matvec as kernel
from pallas_kernels.mosaic_gpu import warpgroup

ON_GPU = jax.default_backend() == "gpu"
EPSILON = 1e-6
# Inputs, outputs, gated ones; what is added and normed.
SMALL = {
    "plain": (512, 24, 0, ()),
    "added": (256, 8, 0, ("add",)),
    "post-norm, gate and others": (256, 80, 32, ("add", "add_scale")),
    "pre-norm, gate alone": (512, 32, 16, ("add", "input_scale")),
    "first layer of pre-norm": (256, 16, 0, ("input_scale",)),
}
LARGE = {  # of the 700M model
    "query, key, value": (1024, 2048, 0, ("add", "add_scale")),
    "output": (1024, 1024, 0, ()),
    "gate, up, entry": (1024, 9216, 4096, ("add", "add_scale")),
    "gate, up": (1024, 8192, 4096, ("add", "input_scale")),
    "down": (4096, 1024, 0, ()),
}


def operands(inputs, outputs, gated, given, dtype=jnp.bfloat16):
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), dtype)

    scales = {"add_scale": 1.0, "input_scale": 1.0} | {name: 1 + 0.3 * random.normal(size=inputs) for name in given}
    optional = {name: jnp.asarray(scales[name], jnp.float32) for name in given if name != "add"}
    if "add" in given:
        optional["add"] = draw(1, inputs)
    return draw(1, inputs), draw(outputs, inputs) / inputs**0.5, optional, {"gated": gated, "epsilon": EPSILON}


def exact(x, matrix, optional, options):
    """In float64, but rounded where the model rounds: x' and what norms give."""

    def rounded(a):
        return np.asarray(jnp.asarray(a, jnp.float32).astype(x.dtype), np.float64)

    def normed(a, name):
        scale = np.asarray(optional[name], np.float64)
        return rounded(scale * a / np.sqrt(np.mean(a * a) + EPSILON))

    total = np.asarray(x[0], np.float64)
    if "add" in optional:
        add = np.asarray(optional["add"][0], np.float64)
        total = rounded(total + (normed(add, "add_scale") if "add_scale" in optional else add))
    found = np.asarray(matrix, np.float64) @ (normed(total, "input_scale") if "input_scale" in optional else total)
    gate, up, rest = np.split(found, (options["gated"], 2 * options["gated"]))
    return total, gate / (1 + np.exp(-gate)) * up, rest


def check(case, implementation, dtype=jnp.bfloat16):
    roundings = 3 if implementation == "xla" else 1  # XLA also rounds gate and up, as the model does
    x, matrix, optional, options = operands(*case, dtype)
    came = matvec.matvec(x, matrix, **optional, **options, implementation=implementation)
    for name, got, expected in zip(came._fields, came, exact(x, matrix, optional, options), strict=True):
        assert (got is None) == (expected.size == 0), name
        if got is not None:
            assert got.dtype == dtype and got.shape == (1, expected.size), name
            error = np.abs(np.asarray(got[0], np.float64) - expected)
            # Of a result one rounding; of an input that lies between two numbers another one may have been chosen.
            bound = roundings * float(jnp.finfo(dtype).eps) * (np.abs(expected) + 0.25)
            worst = np.argmax(error - bound)
            assert error[worst] <= bound[worst], (name, worst, got[0, worst], expected[worst])


@pytest.mark.skipif(ON_GPU, reason="on the chip the next test does it")
@pytest.mark.parametrize("case", SMALL)
def test_the_kernel_interpreted(case, capsys):
    check(SMALL[case], "mosaic_gpu")
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.skipif(ON_GPU, reason="on the chip the next test does it")
def test_the_kernel_in_float16(capsys):
    check(SMALL["post-norm, gate and others"], "mosaic_gpu", jnp.float16)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize("case", SMALL)
def test_xlas_form(case):
    check(SMALL[case], "xla")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", SMALL | LARGE)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_kernel_on_the_chip(case, dtype):
    check((SMALL | LARGE)[case], "mosaic_gpu", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("sets", [1, 2, 4])
def test_every_number_of_sets_on_the_chip(sets):
    x, matrix, optional, options = operands(*LARGE["gate, up, entry"])
    arrays = [x[0], matrix, optional["add"][0], optional["add_scale"]]
    expected = kernel.matvec(*arrays, **options)
    for got, want in zip(kernel.matvec(*arrays, **options, sets=sets), expected, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("case", LARGE)
def test_it_lowers_for_hopper_at_the_models_sizes(case, monkeypatch):
    monkeypatch.setattr(warpgroup, "default_interpret", lambda: False)
    x, matrix, optional = jax.eval_shape(lambda: operands(*LARGE[case])[:3])
    options = {"gated": LARGE[case][2], "epsilon": EPSILON}
    run = jax.jit(lambda *a: matvec.matvec(*a[:2], **a[2], **options, implementation="mosaic_gpu"))
    text = run.trace(x, matrix, optional).lower(lowering_platforms=("cuda",)).as_text()
    assert f"moda_matvec_O{LARGE[case][1]}_D{LARGE[case][0]}" in text


def test_nearly_all_of_the_models_programs_run_at_a_time():
    found = {case: kernel.sets_for(inputs, outputs, gated, 132) for case, (inputs, outputs, gated, _) in LARGE.items()}
    assert found == {"query, key, value": 1, "output": 1, "gate, up, entry": 4, "gate, up": 2, "down": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": jnp.float32}, "dtype=float32"), ({"rows": 2}, "2 rows"), ({"inputs": 320}, "320 inputs"),
        ({"outputs": 30}, "30 outputs"), ({"outputs": 36, "gated": 16}, "36 outputs"),
    ],
)  # fmt: skip
def test_what_it_does_not_take_it_refuses(fields, message):
    with pytest.raises(NotImplementedError, match=message):
        kernel.check_supported(**{"dtype": jnp.bfloat16, "rows": 1, "inputs": 256, "outputs": 32} | fields)


def test_none_takes_the_kernel_on_hopper(monkeypatch):
    monkeypatch.setattr(dispatch, "_device", lambda: ("gpu", "9.0"))
    shape = (jnp.dtype(jnp.bfloat16), 1, 1024, 2048, 0)
    matvec._best.cache_clear()
    assert matvec._best(*shape) == "mosaic_gpu"
    assert matvec._best(jnp.dtype(jnp.float32), *shape[1:]) == "xla"
    matvec._best.cache_clear()


def test_a_name_that_is_none_is_refused():
    with pytest.raises(ValueError, match="implementation='triton': expected None or one of"):
        matvec.matvec(jnp.zeros((1, 8)), jnp.zeros((4, 8)), implementation="triton")


def test_xlas_product_of_one_row_is_one_sum_along_the_matrix_on_a_gpu():
    """Of unrounded products: XLA's own form of it would round them."""
    x, matrix = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 32), (48, 32)))
    traced = jax.jit(matvec.product).trace(x, matrix)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.reduce" in text and "dot_general" not in text
    assert "dot_general" in traced.lower(lowering_platforms=("cpu",)).as_text()
