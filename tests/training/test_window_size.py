"""The size of windows: a share of the memory, within limits."""

import pytest

from ktray.training.window_size import window_bytes

ROW = 3 * 224**2


@pytest.mark.parametrize(
    ("memory", "computed", "expected"),
    [
        (0, False, 256_000_000),
        (1e9, False, 256_000_000),
        (8e9, False, 1_000_000_000),
        (500e9, False, 1_000_000_000),
        (500e9, True, 2 * 4 * 512 * ROW),  # the first batch waits for twice its images, not for the whole memory
        (8e9, True, 2 * 4 * 512 * ROW),
        (4e9, True, 500_000_000),
        (0, True, 256_000_000),
    ],
)
def test_windows_are_a_share_of_the_memory(memory, computed, expected):
    assert window_bytes(memory, ROW, 4, 512, computed) == expected


def test_a_large_batch_has_as_much_as_it_needs() -> None:
    assert window_bytes(500e9, ROW, 4, 1024, False) == 2 * 4 * 1024 * ROW
    assert window_bytes(500e9, ROW, 4, 4096, False) == 2_000_000_000
    assert window_bytes(8e9, ROW, 4, 1024, False) == 1_000_000_000, "an eighth of the memory at most"
