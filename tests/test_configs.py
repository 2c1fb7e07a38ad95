import dataclasses
import importlib.util
from pathlib import Path

import pytest

from moda_jax import image_param_count, param_count
from moda_jax.config import Config
from moda_jax.depth_config import MECHANISMS
from moda_jax.model.depth.registry import find_mechanism
from moda_jax.tasks.vision import Vision

DIRECTORY = Path(__file__).parents[1] / "configs"


def load(name, *argument):
    """As `--config=configs/NAME.py:ARGUMENT` does."""
    spec = importlib.util.spec_from_file_location(f"config_{name}", DIRECTORY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument)


def build(name, *argument):
    return Config.from_dict(load(name, *argument).to_dict())


SMALL = ("48_pre", "48_post", "48_pre_depth", "48_post_depth", "48_pre_depth_ffn", "48_post_depth_ffn",
         "24_post", "24_post_depth", "24_post_depth_ffn")  # fmt: skip
FAMILY = (*MECHANISMS, *(f"moda_{name}" for name in (
    "own_kv", "window", "hybrid", "stride", "top", "null_slot", "entry_bias", "separate", "writer_norm", "reader_norm",
    "reader_norm_unrotated", "float8",
)))  # fmt: skip
# Layers: parameters in millions, without depth, of all and of all but the embedding and the head.
DEPTHBENCH = {
    16: (407, 284), 20: (414, 301), 24: (405, 302), 26: (408, 308), 28: (406, 310), 30: (404, 311), 32: (399, 309),
}  # fmt: skip
ALL = [
    ("base",), ("quickstart",), ("olmo2_700m",), ("moda_700m",), ("moda_1p5b",), ("small",), ("depth_comparison",),
    *(("moda_700m", f"row{row}") for row in range(1, 6)),
    *(("small", f"row{row}") for row in range(1, 10)),
    *(("small", name) for name in SMALL),
    *(("depth_comparison", name) for name in ("none", "moda", "moda_own_kv")),
    ("depthbench",), *(("depthbench", f"{form}_L{n}") for form in ("moda", "post", "none") for n in DEPTHBENCH),
    ("vision_quickstart",), ("vision_quickstart", "none"),
    *((f"deit_{size}", name) for size in ("tiny", "small") for name in ("none", "moda", "moda_64l")),
    ("family",), *(("family", name) for name in FAMILY), *(("family", f"48_{name}") for name in FAMILY),
]  # fmt: skip


@pytest.mark.parametrize("arguments", ALL, ids=":".join)
def test_every_config_is_valid(arguments):
    config = build(*arguments)
    assert config.model.vocab_size >= 257
    assert Config.from_dict(config.to_dict()) == config
    find_mechanism(config.model.depth).check(config.model)


def test_no_config_is_forgotten():
    files = {path.stem for path in DIRECTORY.glob("*.py")} - {"__init__"}
    assert files == {arguments[0] for arguments in ALL}


@pytest.mark.parametrize("layers", DEPTHBENCH)
def test_depthbenchs_models_have_the_published_sizes(layers):
    plain, moda = (build("depthbench", f"{form}_L{layers}").model for form in ("none", "moda"))
    vocabularies = 2 * plain.vocab_size * plain.width
    count = param_count(plain)
    assert (round(count / 1e6), round((count - vocabularies) / 1e6)) == DEPTHBENCH[layers]
    assert param_count(moda) == count + (layers - 1) * 2 * plain.width**2  # the FFN's projections
    with pytest.raises(ValueError, match=r"depthbench.py:moda: unknown argument; known: moda_L16, "):
        load("depthbench", "moda")


def test_an_unknown_member_of_the_family_is_refused_with_those_that_there_are():
    with pytest.raises(
        ValueError, match=r"family.py:48_moha: unknown argument; known: none, moda, denseformer, .*moda_"
    ):
        load("family", "48_moha")
    assert build("family", "48_hc").model.num_layers == 48


def test_base_is_the_dataclasses_defaults():
    assert build("base") == Config()


def test_every_field_can_be_set_and_keeps_its_type():
    config = load("base")
    config.lock()
    config.model.dtype = "bfloat16"
    config.data.cache_dir = "/x"
    config.optimizer.learning_rate = 1
    built = Config.from_dict(config.to_dict())
    assert (built.model.dtype, built.data.cache_dir, built.optimizer.learning_rate) == ("bfloat16", "/x", 1.0)
    with pytest.raises(TypeError):
        config.model.dtype = 16
    with pytest.raises(AttributeError):
        config.model.widht = 3


@pytest.mark.parametrize(("row", "millions"), [(1, 669.0), (2, 700.5), (3, 669.0), (4, 705.7), (5, 742.4)])
def test_the_700m_models_have_the_papers_size(row, millions):
    config = build("moda_700m", f"row{row}")
    assert round(param_count(config.model) / 1e6, 1) == millions
    assert config.train.num_steps * config.train.batch_size * config.data.sequence_length == pytest.approx(
        400e9, rel=1e-5
    )


def test_the_baseline_is_row_one_and_has_no_depth():
    assert build("olmo2_700m") == build("moda_700m", "row1")
    assert build("olmo2_700m").model.depth == "none"
    assert build("moda_700m") == build("moda_700m", "row4")


def test_the_large_model_has_one_and_a_half_billion_parameters_and_its_projections():
    model = build("moda_1p5b").model
    assert param_count(dataclasses.replace(model, depth="none")) == pytest.approx(1.50e9, rel=0.005)
    assert param_count(model) == pytest.approx(1.59e9, rel=0.005)


@pytest.mark.parametrize(
    ("row", "name", "millions"),
    [*zip(range(1, 10), SMALL, (123.38, 123.38, 123.38, 123.38, 128.11, 128.11, 71.35, 71.35, 73.72), strict=True)],
)
def test_the_small_models_have_the_papers_size(row, name, millions):
    config = build("small", f"row{row}")
    assert config == build("small", name)
    assert param_count(config.model) / 1e6 == pytest.approx(millions, rel=0.003)


def test_an_unknown_argument_names_the_known_ones():
    with pytest.raises(ValueError, match=r"configs/moda_700m\.py:row6: unknown argument; known: row1, row2"):
        load("moda_700m", "row6")
    with pytest.raises(ValueError, match=r"configs/small\.py:48: unknown argument; known: 48_pre, "):
        load("small", "48")
    with pytest.raises(ValueError, match=r"configs/depth_comparison\.py:x: unknown argument; known: none, moda"):
        load("depth_comparison", "x")


def test_the_depth_comparison_differs_in_depth_alone():
    none, own, both = (build("depth_comparison", name) for name in ("none", "moda_own_kv", "moda"))
    assert param_count(none.model) == param_count(own.model) < param_count(both.model)
    assert none.model.num_layers == 12
    alike = {"depth": "none", "depth_ffn_kv": none.model.depth_ffn_kv}
    for config in (own, both):
        assert dataclasses.replace(config, model=dataclasses.replace(config.model, **alike)) == none


@pytest.mark.parametrize(
    ("size", "name", "parameters"),
    [("tiny", "none", 5_717_416), ("small", "none", 22_050_664), ("tiny", "moda", None), ("tiny", "moda_64l", None)],
)
def test_the_deits_are_deit_and_with_depth(size, name, parameters):
    config = build(f"deit_{size}", name)
    model = config.model
    Vision(config)  # checks what a model of images needs
    assert (model.num_layers, model.depth) == (64 if name == "moda_64l" else 12, "none" if name == "none" else "moda")
    plain = dataclasses.replace(model, depth="none", num_layers=12)
    assert image_param_count(plain) == {"tiny": 5_717_416, "small": 22_050_664}[size]
    if parameters is not None:
        assert image_param_count(model) == parameters
    assert config.train.num_steps == 300 * (1281167 // 1024) and config.data.images.augmentation_repeats == 3


def test_an_unknown_deit_is_refused():
    with pytest.raises(ValueError, match=r"configs/deit_small\.py:x: unknown argument; known: none, moda, moda_64l"):
        load("deit_small", "x")
