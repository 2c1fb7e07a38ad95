"""The costs in docs/mechanisms.md are those that the mechanisms name."""

import re
from pathlib import Path

from configs import family
from moda_jax import param_count
from moda_jax.config import Config
from moda_jax.depth_config import MECHANISMS
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
