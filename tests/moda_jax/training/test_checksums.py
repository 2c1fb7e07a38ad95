import hashlib
import json
import random
import time

import pytest

from moda_jax.training import checksums
from moda_jax.training.checksums import find_damage, total_bytes, write_manifest


@pytest.fixture
def directory(tmp_path):
    for name, size in (("a", 1), ("b/c", 100), ("b/d/e", 1000), ("empty", 0)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(name).randbytes(size))
    return tmp_path


def test_a_directory_as_it_was_written_has_no_damage(directory):
    write_manifest(directory)
    assert find_damage(directory) == []
    assert total_bytes(directory) == 1101


def test_digests_are_those_of_hashlib(directory, monkeypatch):
    monkeypatch.setattr(checksums, "_PIECE_BYTES", 300)
    write_manifest(directory)
    manifest = json.loads((directory / "CHECKSUMS").read_text().splitlines()[0])
    data = (directory / "b/d/e").read_bytes()
    expected = [hashlib.sha256(data[i : i + 300]).hexdigest() for i in range(0, 1000, 300)]
    assert manifest["files"]["b/d/e"] == {"bytes": 1000, "sha256": expected}
    assert manifest["files"]["empty"] == {"bytes": 0, "sha256": []}
    assert set(manifest["files"]) == {"a", "b/c", "b/d/e", "empty"}


@pytest.mark.parametrize("piece_bytes", [64, 2**26])
def test_every_single_bit_counts(directory, monkeypatch, piece_bytes):
    monkeypatch.setattr(checksums, "_PIECE_BYTES", piece_bytes)
    write_manifest(directory)
    data = (directory / "b/c").read_bytes()
    for bit in range(0, 800, 7):
        spoiled = bytearray(data)
        spoiled[bit // 8] ^= 1 << bit % 8
        (directory / "b/c").write_bytes(spoiled)
        piece = bit // 8 // piece_bytes * piece_bytes
        assert find_damage(directory) == [f"b/c: its content has changed (in the piece from byte {piece} on)"]
    (directory / "b/c").write_bytes(data)
    assert find_damage(directory) == []


def test_every_byte_of_the_manifest_counts(directory):
    write_manifest(directory)
    data = (directory / "CHECKSUMS").read_bytes()
    for place in range(len(data)):
        spoiled = bytearray(data)
        spoiled[place] ^= 1 << place % 8
        (directory / "CHECKSUMS").write_bytes(spoiled)
        (problem,) = find_damage(directory)
        assert problem.startswith("CHECKSUMS: "), problem
    for length in range(len(data)):
        (directory / "CHECKSUMS").write_bytes(data[:length])
        assert len(find_damage(directory)) == 1


def test_all_damage_is_named_once(directory):
    write_manifest(directory)
    (directory / "a").unlink()
    (directory / "b/c").write_bytes(b"short")
    (directory / "empty").write_bytes(b"x")
    (directory / "not in the manifest").write_bytes(b"does not matter")
    assert find_damage(directory) == [
        "a: missing",
        "b/c: has 5 bytes, was written with 100",
        "empty: has 1 bytes, was written with 0",
    ]


def test_a_newer_format_is_not_guessed_at(directory, monkeypatch):
    monkeypatch.setattr(checksums, "_FORMAT", 2)
    write_manifest(directory)
    monkeypatch.undo()
    assert find_damage(directory) == ["CHECKSUMS: format 2, this version reads 1"]


def test_a_gigabyte_takes_less_than_a_second_of_one_core(tmp_path):
    """In seconds of the processor, which other processes do not lengthen; the threads share them."""
    data = random.Random(0).randbytes(2**26)
    for number in range(4):
        (tmp_path / str(number)).write_bytes(data)
    write_manifest(tmp_path)
    seconds, walls = [], []
    for _ in range(3):
        began, wall = time.process_time(), time.monotonic()
        assert find_damage(tmp_path) == []
        seconds.append(time.process_time() - began)
        walls.append(time.monotonic() - wall)
    print(f"{2**28 / min(seconds) / 1e9:.2f} GB per core and second, {2**28 / min(walls) / 1e9:.2f} GB/s")
    assert 2**28 / min(seconds) > 1e9
