"""The benchmark of attention over an image's tokens, on a CPU: the script runs, the numbers mean nothing."""

import pytest

from benchmarks import short_attention


@pytest.mark.slow
def test_it_times_the_contestants_that_are_named(capsys):
    short_attention.main(["--batch=1", "--tokens=8", "--heads=1", "--rounds=1", "--only=forward 1x64x4,dq 1x64x4"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line[:32].strip() for line in lines] == ["forward 1x64x4", "dq 1x64x4"]
    assert all(line.endswith(" us") and float(line.split()[-2]) > 0 for line in lines)


def test_an_unknown_contestant_is_named(capsys):
    with pytest.raises(SystemExit):
        short_attention.main(["--only=dq 7x64x4,cudnn forward"])
    assert "--only=dq 7x64x4: expected some of forward 3x128x4, " in capsys.readouterr().err
