"""Things made once: two processes at a time, a kill half-way, an error half-way."""

import logging
import os
import signal
import time

import pytest
from support.documents import data_config, random_texts, start_python, write_texts

from moda_jax.config import DataConfig
from moda_jax.data.cache import cache_directory, cache_key, prepare_once
from moda_jax.data.listing import list_files
from moda_jax.data.pipeline import open_dataset
from moda_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from moda_jax.inference.perplexity import read_domain

pytestmark = pytest.mark.timeout(400)  # a process that waits for ever is what these tests look for

# A maker that says when it has begun, and goes on when told to.
SLOW_MAKER = """
import sys
from pathlib import Path
from moda_jax.data.cache import prepare_once

def prepare(directory):
    (directory / "first").write_text("half")
    print("begun", flush=True)
    sys.stdin.readline()
    (directory / "second").write_text("whole")

prepare_once(Path(sys.argv[1]), prepare, "The thing")
print("there", flush=True)
"""

OPEN_DATASET = """
import logging, sys
from moda_jax import progress
from moda_jax.config import DataConfig
from moda_jax.data.pipeline import open_dataset
from moda_jax.data.tokenizer import ByteTokenizer

logging.basicConfig()
logging.getLogger("moda_jax").setLevel(logging.INFO)
progress.INTERVAL_SECONDS = 0.0  # stderr is a pipe: progress is lines, here one for every step of it
config = DataConfig(source=sys.argv[1], cache_dir=sys.argv[2], sequence_length=16)
print("ready", flush=True)
sys.stdin.readline()
for split in ("train", "validation"):
    print(open_dataset(config, split, ByteTokenizer()).fingerprint, flush=True)
"""

# Killed while TFDS has one split written and reads the other.
KILLED_HALF_WAY = """
import sys
from moda_jax.config import DataConfig
from moda_jax.data import corpus
from moda_jax.data.pipeline import open_dataset
from moda_jax.data.tokenizer import ByteTokenizer

read_documents = corpus.read_documents

def stop_in_validation(files, config, split_of, split, progress, skipped):
    for document in read_documents(files, config, split_of, split, progress, skipped):
        if split == "validation":
            print("half", flush=True, file=sys.__stdout__)  # TFDS's own words on stdout are held back
            sys.stdin.readline()
        yield document

corpus.read_documents = stop_in_validation
config = DataConfig(source=sys.argv[1], cache_dir=sys.argv[2], sequence_length=16)
open_dataset(config, "train", ByteTokenizer())
"""


def without_home(monkeypatch):
    """As in a container under a user id that the system does not know."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)


def test_a_user_without_a_home_directory_is_told_what_to_set(monkeypatch, tmp_path):
    without_home(monkeypatch)
    with pytest.raises(ValueError, match=r"data\.cache_dir=None: user 54321 has no home directory .*; set data"):
        cache_directory(DataConfig())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory(DataConfig()) == tmp_path / "moda_jax"
    for field, call in {
        "data.cache_dir": lambda: cache_directory(DataConfig(cache_dir="~/cache")),
        "data.source": lambda: list_files(DataConfig(source="~/corpus")),
        "data.tokenizer": lambda: load_tokenizer(DataConfig(tokenizer="~/t.json")),
        "--data=a": lambda: read_domain("a=~/text.txt"),
    }.items():
        with pytest.raises(ValueError, match=rf"{field}='~/.*': user 54321 has no home directory .*; write the pa"):
            call()


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()


def test_made_once_and_found_again(tmp_path):
    calls = []

    def prepare(directory):
        calls.append(directory)
        (directory / "file").write_text("x")

    for _ in range(2):
        assert prepare_once(tmp_path / "a" / "thing", prepare, "The thing") == tmp_path / "a" / "thing"
    assert len(calls) == 1 and calls[0] != tmp_path / "a" / "thing"
    assert (tmp_path / "a" / "thing" / "file").read_text() == "x"


def test_an_error_leaves_nothing(tmp_path):
    def prepare(directory):
        (directory / "file").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_once(tmp_path / "thing", prepare, "The thing")
    assert [path.name for path in tmp_path.iterdir()] == ["thing.lock"]
    prepare_once(tmp_path / "thing", lambda directory: None, "The thing")
    assert (tmp_path / "thing").is_dir()


@pytest.mark.slow
def test_a_second_process_waits_and_says_so(tmp_path):
    first = start_python(SLOW_MAKER, tmp_path / "thing")
    assert first.stdout.readline() == "begun\n"
    second = start_python(SLOW_MAKER, tmp_path / "thing")
    assert "The thing: another process is preparing this; waiting" in second.stderr.readline()
    time.sleep(0.2)
    assert second.poll() is None and not (tmp_path / "thing").exists()
    assert first.communicate("\n", timeout=60)[0] == "there\n"
    assert second.communicate(timeout=60)[0] == "there\n"  # it did not begin
    assert sorted(path.name for path in (tmp_path / "thing").iterdir()) == ["first", "second"]


def test_a_waiting_process_takes_over_from_a_killed_one(tmp_path):
    first = start_python(SLOW_MAKER, tmp_path / "thing")
    assert first.stdout.readline() == "begun\n"
    second = start_python(SLOW_MAKER, tmp_path / "thing")
    assert "waiting" in second.stderr.readline()
    kill(first)
    assert second.stdout.readline() == "begun\n"
    out, err = second.communicate("\n", timeout=60)
    assert out == "there\n" and "The thing: removing what an interrupted process left" in err
    assert sorted(path.name for path in (tmp_path / "thing").iterdir()) == ["first", "second"]


@pytest.mark.slow
def test_two_processes_prepare_the_same_data_at_once(tmp_path):
    source = write_texts(tmp_path / "texts", random_texts(200))
    processes = [start_python(OPEN_DATASET, source, tmp_path / "cache") for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]
    for line in ("Preparing the corpus", f"Tokenizing {source} (train)", f"Tokenizing {source} (validation)"):
        assert sum(line in err for _, err in results) == 1, results  # one of the two made it, and said so
    alone = data_config(source, tmp_path / "other-cache")
    fingerprints = [open_dataset(alone, split, ByteTokenizer()).fingerprint for split in ("train", "validation")]
    assert results[0][0].split() == fingerprints


def test_killed_half_way_then_prepared_again(tmp_path, caplog):
    source = write_texts(tmp_path / "texts", random_texts(40))
    process = start_python(KILLED_HALF_WAY, source, tmp_path / "cache")
    assert process.stdout.readline() == "half\n"
    kill(process)
    left = {path.name.partition(".")[2] for path in (tmp_path / "cache").glob("*/*")}
    assert left == {"lock", "incomplete"}
    with caplog.at_level(logging.WARNING, "moda_jax"):
        dataset = open_dataset(data_config(source, tmp_path / "cache"), "train", ByteTokenizer())
    assert "removing what an interrupted process left" in caplog.text
    fresh = open_dataset(data_config(source, tmp_path / "other-cache"), "train", ByteTokenizer())
    assert dataset.fingerprint == fresh.fingerprint
    assert not list((tmp_path / "cache").rglob("*incomplete*"))


def test_default_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory(DataConfig()) == tmp_path / "xdg" / "moda_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory(DataConfig()) == tmp_path / "home" / ".cache" / "moda_jax"
    assert cache_directory(DataConfig(cache_dir="~/mine")) == tmp_path / "home" / "mine"
    assert (tmp_path / "home" / "mine").is_dir()


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=rf"data\.cache_dir='{tmp_path}/file/cache': cannot be created"):
        cache_directory(DataConfig(cache_dir=str(tmp_path / "file" / "cache")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*no permission to write there"):
        cache_directory(DataConfig(cache_dir=str(tmp_path)))


def test_keys_differ_when_facts_do():
    assert cache_key(a=1, b=[2, "x"]) == cache_key(b=[2, "x"], a=1)
    assert len({cache_key(a=1), cache_key(a=2), cache_key(b=1), cache_key(a="1"), cache_key(a=None)}) == 5
