"""The benchmark of all mechanisms at toy size on a CPU: what it counts, what its table says, that it runs."""

import json

import pytest

from benchmarks import family
from configs import family as names
from moda_jax.config import Config
from moda_jax.model.depth.registry import find_mechanism


def config(name, layers=3):
    values = names.get_config(name).to_dict()
    values["model"]["num_layers"] = layers
    return Config.from_dict(values).model


# Slots that each read finds, written out from the equations, for three layers.
SLOTS_READ = {
    "none": 0,
    "denseformer": 2 + 3 + 4,  # behind each layer: the embedding and the outputs so far
    "moda": 0 + 2 + 4,  # key and value of attention and FFN of every layer before
    "moda_own_kv": 0 + 1 + 2,
    "attnres": 1 + 2 + 3 + 4 + 5 + 6 + 7,  # six sub-layers and the head
    "attnres_block": 1 + 1 + 1 + 1 + 2 + 2 + 2,  # a block has four sub-layers; the unfinished one is the carry
    "attnres_delta": 2 + 3 + 4 + 5 + 6,  # nothing before the first
    "mudd": 2 + 3 + 4,
    "value_mixing": 0 + 1 + 1,  # every fourth layer is a source
    "value_residual": 0 + 1 + 1,
    "depth_attention": 1 + 2 + 3 + 4 + 5 + 6 + 7,
    "hc": 0,
    "mhc": 0,
}


@pytest.mark.parametrize("name", SLOTS_READ)
def test_slots_that_are_read(name):
    assert find_mechanism(config(name).depth).slots_read(config(name)) == SLOTS_READ[name]


def test_bytes_of_a_token_and_of_its_reads():
    """Width 384, two KV heads of 64."""
    assert family.stream_bytes(config("none")) == (0, 0)
    assert family.stream_bytes(config("attnres")) == (7 * 384 * 2, 28 * 384 * 2)
    assert family.stream_bytes(config("moda")) == (4 * 2 * 128 * 2, 6 * 2 * 128 * 2)  # the last layer writes nothing


def result(case, seconds, floor, **more):
    return {
        "case": case, "seconds_per_step": [seconds], "tokens_per_second": 1 / seconds, "floor_seconds": floor,
        "peak_bytes": 2**31, "stream_bytes": 1024,
    } | more  # fmt: skip


def test_the_table_compares_with_none_and_with_the_floor():
    decode = {"milliseconds_per_step": 4.25, "cache_bytes_per_token": 73728}
    lines = family.table([
        result("none", 0.4, 0.0, decode=decode), result("attnres", 0.8, 0.1, decode_error="RESOURCE_EXHAUSTED: x"),
        {"case": "hc", "error": "ValueError: y"},
    ]).splitlines()  # fmt: skip
    assert lines[1].split() == ["none", "400.0", "1.00", "2", "0.0", "-", "2.0", "1,024", "4.25", "73728"]
    assert lines[2].split() == ["attnres", "800.0", "2.00", "1", "100.0", "4.00", "2.0", "1,024", "-", "-"]
    assert lines[3].split() == ["hc", "ValueError:", "y"]
    assert lines[4] == "attnres: no decoding: RESOURCE_EXHAUSTED: x"


def test_an_unknown_name_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["family", "--names=none,mood"])
    with pytest.raises(SystemExit):
        family.main()
    assert "--names: unknown mechanism 'mood'; known: none, " in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch, capsys):
    options = ["--toy", "--devices=cpu", "--batch=1", "--sequence-length=64", "--steps=1", "--rounds=1"]
    options += ["--decode-batch=1", "--decode-steps=4", "--prompt=16", "--names=none,moda", f"--output={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["family", *options])
    family.main()
    results = json.loads((tmp_path / "family_700m.json").read_text())["results"]
    assert [r["case"] for r in results] == ["none", "moda"] and not any("error" in r for r in results)
    caches = {r["decode"]["cache_bytes_per_token"] for r in results}
    assert caches == {2 * 2 * 16 * 2} and results[1]["floor_seconds"] > 0  # layers, K and V, 16 bits
    assert (tmp_path / "family_700m.txt").read_text() in capsys.readouterr().out
