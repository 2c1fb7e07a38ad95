"""The benchmarks' pictures, from the committed results."""

from benchmarks import pictures


def test_every_committed_picture_is_drawn_from_the_results_beside_it(tmp_path):
    drawn = {path.name for path in pictures.draw_all(pictures.RESULTS, tmp_path)}
    assert drawn == {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in pictures.RESULTS.glob("*.png")} <= drawn
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
