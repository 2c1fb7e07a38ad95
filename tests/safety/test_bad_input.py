"""2,000 generated mistakes in configs and in calls of the ops: each a ValueError that names the field, at once.

The rules below are written from what the fields mean, not from the code that checks them.
"""

import dataclasses
import time
import traceback
import typing

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moda_jax.config import Config
from moda_jax.depth_config import MECHANISMS
from pallas_kernels import depth_attention, moda_attention

CONFIGS, CALLS = 1400, 600
SECONDS = 2.0

POSITIVE = """
model: vocab_size num_layers width num_heads num_kv_heads head_dim ffn_width rope_theta norm_epsilon
model: max_sequence_length initializer_range
data: sequence_length prefetch_batches max_document_bytes
optimizer: learning_rate epsilon gradient_clip_norm decay_fraction
train: num_steps batch_size accumulation_steps log_interval_steps
checkpoint: keep_last max_failed_saves
"""
NOT_NEGATIVE = """
optimizer: warmup_steps weight_decay beta1 beta2 final_learning_rate_fraction
train: seed z_loss sample_tokens max_skipped_in_a_row loss_spike_deviations watchdog_seconds
eval: interval_steps num_batches
checkpoint: interval_steps keep_every_steps retry_pause_seconds
"""
BELOW_ONE = [("optimizer", "beta1"), ("optimizer", "beta2"), ("data", "validation_fraction")]
CHOICES = [
    ("model", "norm"), ("model", "depth"), ("model", "remat"), ("model", "layer_loop"), ("model", "dtype"),
    ("model", "attention_implementation"), ("model", "depth_gradient_dtype"), ("data", "on_damage"),
    ("model", "norm_kind"), ("model", "ffn"), ("data", "on_invalid_utf8"), ("optimizer", "name"),
    ("optimizer", "schedule"), ("optimizer", "decay_shape"),
]  # fmt: skip
SECTIONS = {field.name: field.default_factory for field in dataclasses.fields(Config)}
FIELDS = [(name, field.name) for name, section in SECTIONS.items() for field in dataclasses.fields(section)]


def listed(text):
    rows = (line.partition(": ") for line in text.split("\n") if line)
    return [(section, field) for section, _, fields in rows for field in fields.split()]


def kind(section, field):
    return typing.get_type_hints(SECTIONS[section])[field]


def named(pairs):
    return st.sampled_from(pairs)


@st.composite
def wrong_type(draw):
    section, field = draw(named(FIELDS))
    hint = kind(section, field)
    allowed = set(typing.get_args(hint) or (hint,))
    values = {
        int: st.integers(1, 5), float: st.floats(0.1, 5.0), str: st.text("ab", min_size=1, max_size=5),
        bool: st.booleans(), type(None): st.none(), list: st.lists(st.integers(), max_size=2),
        tuple: st.tuples(st.integers()), dict: st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
        bytes: st.binary(max_size=3), complex: st.just(1j),
    }  # fmt: skip
    if float in allowed:
        allowed.add(int)
    if dataclasses.is_dataclass(hint):  # a section in a section
        allowed.add(dict)
    wrong = [kind for kind in values if kind not in allowed]
    if "dtype" in field:  # dtype objects are taken there
        wrong = [kind for kind in wrong if kind not in (int, float, bool, complex, bytes)]
    return section, field, draw(values[draw(st.sampled_from(wrong))])


@st.composite
def too_small(draw):
    section, field = draw(named(listed(POSITIVE)))
    values = st.integers(-(2**70), 0) if kind(section, field) is int else st.floats(max_value=0.0, allow_nan=False)
    return section, field, draw(values)


@st.composite
def negative(draw):
    section, field = draw(named(listed(NOT_NEGATIVE)))
    below = st.floats(max_value=-1e-300, allow_nan=False)
    return section, field, draw(st.integers(-(2**70), -1) if kind(section, field) is int else below)


@st.composite
def too_large(draw):
    """Integers that no device counts with: they must not get as far as JAX, which overflows."""
    section, field = draw(named([pair for pair in FIELDS if kind(*pair) is int]))
    return section, field, draw(st.integers(2**31, 2**70))


@st.composite
def no_number(draw):
    section, field = draw(named([pair for pair in FIELDS if kind(*pair) is float]))
    return section, field, draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))


@st.composite
def no_share(draw):
    section, field = draw(named(BELOW_ONE))
    return section, field, draw(st.floats(min_value=1.0, max_value=1e30))


@st.composite
def no_choice(draw):
    section, field = draw(named(CHOICES))
    words = st.text("abcdefgh ", min_size=1, max_size=8).filter(lambda word: word not in MECHANISMS)
    return section, field, draw(words)


@st.composite
def no_device(draw):
    axis = draw(st.sampled_from(["data", "fsdp", "tensor", "context"]))
    return "mesh", axis, draw(st.one_of(st.just(0), st.integers(-64, -2)))


single_fields = st.one_of(
    wrong_type(), too_small(), negative(), too_large(), no_number(), no_share(), no_choice(), no_device()
)


@st.composite
def fields_at_odds(draw):
    """Values that are good alone: (sections, fields of which one must be named)."""
    number = draw(st.integers(2, 4000))
    case = draw(st.integers(0, 4))
    if case == 0:
        kv_heads = draw(st.integers(2, 64))
        heads = draw(st.integers(1, 256).filter(lambda n: n % kv_heads))
        return {"model": {"num_heads": heads, "num_kv_heads": kv_heads}}, ["model.num_heads", "model.num_kv_heads"]
    if case == 1:
        return {"model": {"head_dim": 2 * number + 1}}, ["model.head_dim"]
    if case == 2:
        parts = draw(st.integers(2, 64))
        batch = draw(st.integers(1, 1000).filter(lambda n: n % parts))
        return {"train": {"batch_size": batch, "accumulation_steps": parts}}, ["train.accumulation_steps"]
    if case == 3:
        longer = number + draw(st.integers(1, 10**6))
        return {"model": {"max_sequence_length": number}, "data": {"sequence_length": longer}}, ["data.sequence_length"]
    more = number + draw(st.integers(1, 10**6))
    return {"train": {"num_steps": number}, "optimizer": {"warmup_steps": more}}, ["optimizer.warmup_steps"]


@st.composite
def unknown_names(draw):
    name = draw(st.text("abcdefgh_", min_size=1, max_size=12))
    if draw(st.booleans()):
        return {f"zz{name}": {}}, [f"zz{name}"]
    section = draw(st.sampled_from(sorted(SECTIONS)))
    return {section: {f"zz{name}": 1}}, [f"{section}.zz{name}"]


bad_configs = st.one_of(
    single_fields.map(lambda bad: ({bad[0]: {bad[1]: bad[2]}}, [f"{bad[0]}.{bad[1]}"])),
    fields_at_odds(),
    unknown_names(),
)
counted = {"configs": 0, "calls": 0, "slowest": 0.0}


def refuse(call, names, what):
    """`call` raises a ValueError that begins with one of `names`, quickly, and not from inside JAX."""
    began = time.process_time()  # and not the clock's: the machine may have other work
    with pytest.raises(ValueError) as caught:
        call()
    counted["slowest"] = max(counted["slowest"], time.process_time() - began)
    assert time.process_time() - began < SECONDS
    counted[what] += 1
    message = str(caught.value)
    assert message.startswith(tuple(names)), (names, message)
    assert len(message) > len(names[0]) + 10, message
    modules = {frame.f_globals["__name__"].split(".")[0] for frame, _ in traceback.walk_tb(caught.value.__traceback__)}
    assert not modules & {"jax", "jaxlib", "flax", "optax", "orbax"}, modules


GENERATED = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=CONFIGS, **GENERATED)
@given(bad_configs)
def test_bad_configs(bad):
    values, names = bad
    refuse(lambda: Config.from_dict(values), names, "configs")


B, T, S, N, K, H = 2, 3, 4, 4, 2, 8
SHAPES = {
    "query": (B, T, N, H), "key": (B, T, K, H), "value": (B, T, K, H),
    "depth_key": (B, T, S, K, H), "depth_value": (B, T, S, K, H),
}  # fmt: skip
ARRAYS = {name: jnp.zeros(shape, jnp.float32) for name, shape in SHAPES.items()}


@st.composite
def bad_calls(draw):
    """(op, arguments, names of which one must begin the message)."""
    op = draw(st.sampled_from([moda_attention, depth_attention]))
    arrays = dict(ARRAYS) if op is moda_attention else {n: ARRAYS[n] for n in ("query", "depth_key", "depth_value")}
    everything = list(arrays)
    name = draw(st.sampled_from(everything))
    case = draw(st.integers(0, 5))
    if case == 0:  # rank
        shape = SHAPES[name][1:] if draw(st.booleans()) else (1, *SHAPES[name])
        return op, arrays | {name: np.zeros(shape, np.float32)}, everything
    if case == 1:  # a size
        shape = list(SHAPES[name])
        axis = draw(st.integers(0, len(shape) - 1))
        if name == "query" and axis == 2:
            shape[axis] = draw(st.sampled_from([1, 3, 5, 7]))  # not a multiple of K
        else:
            shape[axis] = draw(st.integers(1, 12).filter(lambda n: n != SHAPES[name][axis]))
        return op, arrays | {name: np.zeros(shape, np.float32)}, everything
    if case == 2:  # a dtype
        dtype = draw(st.sampled_from(["float64", "int32", "bool", "complex64", "bfloat16", "uint8"]))
        return op, arrays | {name: np.zeros(SHAPES[name], jnp.dtype(dtype))}, everything
    if case == 3:  # no array
        value = draw(st.sampled_from([1.0, "x", [[1.0]], (), {}, object(), b"x"]))
        return op, arrays | {name: value}, [name]
    if case == 4:
        length = draw(st.one_of(st.integers(-(2**40), -1), st.integers(S + 1, 2**40), st.floats(), st.text(max_size=3)))
        return op, arrays | {"depth_length": length}, ["depth_length"]
    option = draw(st.sampled_from(["scale", "implementation"]))
    values = {
        "scale": st.one_of(st.sampled_from([float("nan"), float("inf")]), st.text(max_size=3), st.just([1.0])),
        "implementation": st.one_of(st.text("abc", min_size=1, max_size=5), st.integers(), st.just(b"xla")),
    }
    return op, arrays | {option: draw(values[option])}, [option]


@settings(max_examples=CALLS, **GENERATED)
@given(bad_calls())
def test_bad_calls(bad):
    op, arguments, names = bad
    refuse(lambda: op(**arguments), names, "calls")


def test_so_many_were_generated():
    """Runs last: hypothesis may stop early when it runs out of new examples."""
    print(counted)
    assert counted["configs"] >= CONFIGS and counted["calls"] >= CALLS
    assert counted["configs"] + counted["calls"] >= 2000
