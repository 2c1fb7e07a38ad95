"""The mesh: sizes, rules, and that every wrong mesh is refused with the fields and sizes in the message."""

import subprocess
import sys

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from support.tiny_run import tiny_config, tiny_values, write_corpus
from support.virtual_devices import ROOT, environment

from moda_jax.config import Config, MeshConfig, TransformerConfig
from moda_jax.model.transformer import Transformer
from moda_jax.parallel.mesh import (
    AXES,
    check_config,
    constrain,
    current_mesh,
    make_mesh,
    mesh_sizes,
    on_mesh,
    partition_spec,
)
from moda_jax.training.trainer import TrainingRun


def abstract_mesh(*sizes):
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize(
    ("mesh", "devices", "expected"),
    [
        ({}, 1, (1, 1, 1, 1)),
        ({}, 8, (8, 1, 1, 1)),
        ({"data": 1, "fsdp": -1}, 8, (1, 8, 1, 1)),
        ({"fsdp": 2, "tensor": 2}, 8, (2, 2, 2, 1)),
        ({"data": 2, "context": 4}, 8, (2, 1, 1, 4)),
        ({"data": 16, "fsdp": 8, "tensor": 4, "context": -1}, 1024, (16, 8, 4, 2)),
    ],
)
def test_sizes(mesh, devices, expected):
    assert tuple(mesh_sizes(MeshConfig(**mesh), devices).values()) == expected


def test_a_product_that_is_not_the_device_count():
    with pytest.raises(
        ValueError, match=r"mesh.data=2, mesh.fsdp=2, .*the product is 4, expected the number of dev.*8"
    ):
        mesh_sizes(MeshConfig(data=2, fsdp=2), 8)
    with pytest.raises(
        ValueError, match=r"mesh.data=-1, mesh.fsdp=3, .*product 3, which does not divide the 8 devices"
    ):
        mesh_sizes(MeshConfig(fsdp=3), 8)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 2, "fsdp": 4}, r"train.batch_size=12: .*multiple of 8 = mesh.data=2 x mesh.fsdp=4 x train.accum.*=1"),
        ({"context": 8}, r"data.sequence_length=40: expected a multiple of 16 = 2 x mesh.context=8"),
    ],
)
def test_a_batch_or_sequence_that_does_not_divide(sizes, message):
    config = Config.from_dict({"train": {"batch_size": 12}, "data": {"sequence_length": 40}})
    with pytest.raises(ValueError, match=message):
        check_config(config, {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | sizes)


def test_a_run_refuses_a_wrong_mesh_before_it_writes(tmp_path):
    write_corpus(tmp_path / "corpus")
    with pytest.raises(ValueError, match="the product is 2, expected the number of devices, 1; set one axis to -1"):
        TrainingRun(tiny_config(tmp_path / "corpus", tmp_path / "cache", mesh={"data": 1, "fsdp": 2}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"tensor": 4}, "error: mesh.tensor=4: does not divide axis kv_heads (model.num_kv_heads) of size 2 of "
                        "parameter last_layer.attention.key.kernel, shape (32, 2, 8)"),
        ({"context": 8}, "error: data.sequence_length=40: expected a multiple of 16 = 2 x mesh.context=8"),
    ],
)  # fmt: skip
def test_the_command_says_it_in_one_line(mesh, message, tmp_path):
    model = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_width": 64}
    sections = {"model": model, "train": {"batch_size": 8}, "data": {"sequence_length": 40}}
    values = tiny_values(write_corpus(tmp_path / "corpus"), tmp_path / "cache", **sections)
    (tmp_path / "config.py").write_text(
        "from configs import base\n\n\ndef get_config():\n"
        f"    config = base.get_config()\n    config.update({values!r})\n    return config\n"
    )
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    done = subprocess.run(
        [sys.executable, "train.py", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}", *sizes],
        cwd=ROOT, env=environment(8), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(message)
    assert not (tmp_path / "run").exists()


def test_specs_follow_the_rules():
    assert partition_spec("batch", "tokens", "kv_heads", "head_dim") == PartitionSpec(
        ("data", "fsdp"), "context", "tensor", None
    )
    assert partition_spec("width", None) == PartitionSpec("fsdp", None)
    with pytest.raises(ValueError, match="logical axis 'time': no rule in RULES; known: batch, tokens"):
        partition_spec("batch", "time")
    with pytest.raises(ValueError, match="two of them are split over the same mesh axis"):
        partition_spec("heads", "ffn")
    with pytest.raises(ValueError, match="two of them are split over the same mesh axis"):
        partition_spec("batch", "width")


def test_nothing_happens_where_there_is_no_mesh():
    x = jax.numpy.ones(3)
    assert current_mesh() is None
    assert constrain(x, "time") is x
    assert make_mesh(MeshConfig()) is None  # one device
    function = lambda x: x  # noqa: E731
    assert on_mesh(None, function) is function
    assert on_mesh(abstract_mesh(1, 1, 1, 1), current_mesh)() is None
    with jax.sharding.use_abstract_mesh(AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,))):
        assert current_mesh() is None  # somebody else's


def test_the_mesh_is_there_while_a_function_is_traced():
    mesh = abstract_mesh(2, 1, 2, 2)
    assert on_mesh(mesh, current_mesh)() == mesh
    assert current_mesh() is None


def test_positions_are_asked_for_where_tokens_are_permuted():
    config = TransformerConfig(vocab_size=16, num_layers=1, width=16, num_heads=2, num_kv_heads=2, head_dim=8)

    def hidden(tokens):
        return Transformer(config, rngs=nnx.Rngs(0)).hidden(tokens)

    with pytest.raises(ValueError, match="positions: expected an array: tokens lie in balanced order"):
        jax.eval_shape(on_mesh(abstract_mesh(1, 1, 1, 8), hidden), jax.ShapeDtypeStruct((8, 16), "int32"))
