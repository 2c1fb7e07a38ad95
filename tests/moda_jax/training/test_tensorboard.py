import resource
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from moda_jax.training.tensorboard import EventFile


def events(path):
    """The records of an events file: length, its checksum, an Event, its checksum."""
    data, found = path.read_bytes(), []
    while len(data) >= 12:
        (length,) = struct.unpack("<Q", data[:8])
        if len(data) < length + 16:
            break  # cut off
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def scalars(directory):
    return [
        (event.step, value.tag, value.simple_value)
        for path in sorted(directory.iterdir())
        for event in events(path)
        for value in event.summary.value
    ]


def test_scalars_arrive_at_once(tmp_path):
    file = EventFile(tmp_path / "tensorboard")
    file.write(1, {"train/loss": 2.0, "validation/loss": 3.0})
    file.write(2, {"train/loss": 1.5})
    expected = [(1, "train/loss", 2.0), (1, "validation/loss", 3.0), (2, "train/loss", 1.5)]
    assert scalars(tmp_path / "tensorboard") == expected
    file.close()
    file.close()


def test_a_resume_purges_from_its_step_on(tmp_path):
    EventFile(tmp_path, purge_step=7).close()
    (path,) = tmp_path.iterdir()
    version, start = events(path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (7, 1)


@pytest.fixture
def limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_events_and_nothing_else(tmp_path, caplog, limit):
    file = EventFile(tmp_path)
    file.write(1, {"loss": 1.0})
    limit(max(path.stat().st_size for path in tmp_path.iterdir()) + 20)
    for step in range(2, 40):  # more than any queue holds
        file.write(step, {"loss": 1.0, "a long name, so that every record is longer than what fits": 2.0})
    limit(resource.RLIM_INFINITY)
    file.write(40, {"loss": 1.0})
    file.close()
    assert {step for step, *_ in scalars(tmp_path)} == {1, 40}
    assert len(list(tmp_path.iterdir())) == 2
    assert caplog.text.count("TensorBoard events are left out from step") == 1
