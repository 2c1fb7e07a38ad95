"""Parameters that say what they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moda_jax.parameter import ParameterKind, ParameterKinds, cast_matrices, parameter


class Toy(nnx.Module):
    def __init__(self):
        self.kernel = parameter(jnp.ones((2, 3)), "width", None, decays=True, is_cast=True)
        self.offset = parameter(jnp.zeros(3), None)


KINDS = ParameterKinds.of(nnx.state(Toy(), nnx.Param))


def test_kinds_are_read_where_the_parameters_were_made():
    assert dict(KINDS.entries) == {
        "kernel": ParameterKind(("width", None), decays=True, is_cast=True), "offset": ParameterKind((None,)),
    }  # fmt: skip
    assert hash(KINDS) == hash(ParameterKinds.of(nnx.state(Toy(), nnx.Param)))


def test_an_array_is_found_wherever_its_tree_stands():
    state = {"mu": [{"kernel": jnp.ones((4, 2, 3)), "offset": jnp.ones(3)}], "count": jnp.zeros(())}
    axes = jax.tree.map_with_path(lambda path, leaf: "/".join(map(str, KINDS.axes(path, leaf.ndim))), state)
    assert axes == {"mu": [{"kernel": "layers/width/None", "offset": "None"}], "count": ""}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"layers": {"bias": np.zeros(3)}}, r"parameter layers\.bias: is none of the model's"),
        (
            {"offset": np.zeros((2, 2, 2))},
            r"parameter .*offset.* of rank 3: has the logical axes \(None,\)",
        ),
    ],
)
def test_an_array_that_is_no_parameter_is_named(tree, message):
    with pytest.raises(ValueError, match=message):
        jax.tree.map_with_path(lambda path, leaf: KINDS.axes(path, leaf.ndim), tree)


def test_a_parameter_that_does_not_say_what_it_is_is_named():
    toy = Toy()
    toy.offset = nnx.Param(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"parameter offset: does not say what it is; make it with moda_jax"):
        ParameterKinds.of(nnx.state(toy, nnx.Param))


def test_every_dimension_has_an_axis():
    with pytest.raises(ValueError, match=r"axes=\('width',\): expected one for each dimension of .* shape \(2, 3\)"):
        parameter(jnp.ones((2, 3)), "width")


def test_matrices_are_cast_in_dicts_and_in_variables_of_whoever_made_them():
    params = nnx.to_pure_dict(nnx.state(Toy(), nnx.Param))
    for tree in (params, nnx.state(Toy(), nnx.Param), nnx.State(jax.tree.map(nnx.Param, params))):
        cast = KINDS.map(cast_matrices(jnp.bfloat16), tree)
        assert (cast["kernel"].dtype, cast["offset"].dtype) == (jnp.bfloat16, jnp.float32)
