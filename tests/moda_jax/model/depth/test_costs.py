"""The costs in docs/mechanisms.md are those that the mechanisms name."""

import re
from pathlib import Path

import pytest
from flax import nnx

from configs import family
from moda_jax import param_count
from moda_jax.config import Config
from moda_jax.depth_config import MECHANISMS
from moda_jax.model.block import Block
from moda_jax.model.depth.registry import find_mechanism

PAGE = Path(__file__).parents[4] / "docs" / "mechanisms.md"


def model(name):
    return Config.from_dict(family.get_config(name).to_dict()).model


def test_parameters_slots_bytes_and_flops_are_as_documented():
    rows = re.findall(
        r"^\| `(\w+)` \| ([\d,]+)[^|]* \| (\d*) ?\| ([\d,]+) \| ([\d.]+) \|$", PAGE.read_text(), re.MULTILINE
    )
    assert {row[0] for row in rows} == set(MECHANISMS)
    plain = param_count(model("none"))
    for name, parameters, slots, size, flops in rows:
        config, mechanism = model(name), find_mechanism(name)
        assert int(parameters.replace(",", "")) == param_count(config) - plain, name
        assert int(slots or 0) == mechanism.slots(config), name
        elements = {
            "HiddenStream": config.width, "DepthStream": 2 * config.num_kv_heads * config.head_dim,
            "ValueStream": config.num_kv_heads * config.head_dim, "NoStream": 0,
        }[mechanism.stream_type.__name__]  # fmt: skip
        carried = mechanism.streams(config) * config.width if name in ("hc", "mhc") else 0
        assert int(size.replace(",", "")) == 2 * (mechanism.slots(config) * elements + carried), name
        assert flops == f"{mechanism.read_flops(config) / 1e6:.3f}", name


@pytest.mark.parametrize(
    ("name", "numbered"),
    [("none", False), ("moda", False), ("moda_window", False), ("moda_stride", True), ("hc", True)],
)
def test_the_layers_number_travels_only_where_a_mechanism_needs_it(name, numbered):
    block = nnx.eval_shape(lambda: Block(model(name), last=False, rngs=nnx.Rngs(0)))
    assert block.cut()[0].numbered is numbered
