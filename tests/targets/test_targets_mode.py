"""Which mode costs the teacher least, and what fits."""

import pytest

from ktray.targets.mode import choose_mode, free_bytes

GB = 10**9


@pytest.mark.parametrize(
    ("rows", "drawn", "row_bytes", "free", "streaming", "mode", "expected"),
    [
        (24_000, 115_200, 3_072, 100 * GB, 0, "cached", "0.074 GB are stored"),
        (24_000, 24_000, 3_072, 100 * GB, 1, "cached", "processes each view once"),
        (24_000, 23_999, 3_072, 100 * GB, 0, "live", "cost more teacher time"),
        (24_000, 10_000, 3_072, 100 * GB, 2, "streamed", "devices of their own"),
        (4_000_000, 10**8, 150_000, 1000 * GB, 0, "live", "600 GB of targets are too large for 1e+03 GB"),
        (4_000_000, 10**8, 150_000, 1000 * GB, 1, "streamed", "too large"),
        (4_000_000, 10**8, 150_000, None, 0, "cached", "processes each view once"),  # object storage
    ],
)
def test_the_mode_follows_from_what_is_used_and_what_fits(rows, drawn, row_bytes, free, streaming, mode, expected):
    chosen, why = choose_mode(rows, drawn, row_bytes, free, streaming)
    assert chosen == mode
    assert expected in why


def test_free_space_is_that_of_the_folder_that_will_be(tmp_path):
    assert free_bytes(str(tmp_path / "not" / "yet")) == pytest.approx(free_bytes(str(tmp_path)), rel=0.1)
    assert free_bytes("s3://bucket/prefix") is None
