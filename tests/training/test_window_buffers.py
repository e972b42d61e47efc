import gc
import weakref

import numpy as np
import pytest

from ktray.training.sampler import RowSampler, Slice
from ktray.training.window_buffers import FillingWindow, WindowBuffers

MB = 1 << 20


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def parts(sizes: list[int], width: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "pixels": rng.integers(0, 256, (n, 3, width, width), dtype=np.uint8),
            "logits": rng.normal(size=(n, 5)).astype(np.float16),
            "view_id": rng.integers(0, 9, n),
            "uri": np.array([f"{n}/{'x' * i}" for i in range(n)], dtype=str),
        }
        for n in sizes
    ]


@pytest.mark.parametrize("width", [3, 400])  # columns with and without buffers
@pytest.mark.parametrize("room", [0, 4])  # rows that do not arrive, because their images are bad
def test_a_filled_window_is_the_concatenation_of_its_parts(width, room):
    given = parts([3, 0, 1, 2], width)
    window = FillingWindow(6 + room, WindowBuffers())
    for part in given:
        window.add(part)
    found = window.take()
    assert found.keys() == given[0].keys()
    for name, values in found.items():
        expected = np.concatenate([part[name] for part in given])
        assert values.dtype == expected.dtype
        assert np.array_equal(values, expected)
    assert window.take() == {}


def test_more_rows_than_were_announced_are_an_error():
    window = FillingWindow(3, WindowBuffers())
    with pytest.raises(ValueError, match="broadcast"):
        window.add(parts([4])[0])


def test_memory_is_used_again_when_no_view_is_left():
    buffers = WindowBuffers()
    first = buffers.empty((2 * MB,), np.dtype(np.uint8))
    place, view = address(first), first[MB:]
    view[:] = 7
    del first
    other = buffers.empty((2 * MB,), np.dtype(np.uint8))
    assert address(other) != place
    other[:] = 1
    assert (view == 7).all()
    del view
    gc.collect()
    larger = buffers.empty((2 * MB // 4 + 1000, 2), np.dtype(np.float16))  # somewhat larger, and of another type
    assert address(larger) == place
    assert larger.shape == (2 * MB // 4 + 1000, 2)
    small = buffers.empty((10,), np.dtype(np.int64))
    assert small.flags.owndata


def test_few_buffers_are_kept_and_they_fit():
    buffers = WindowBuffers()
    for size in range(2, 40):
        buffers.empty((size * MB,), np.dtype(np.uint8))
    assert sum(map(len, buffers._free)) <= 2 * 39 * MB * 9 // 8  # those of smaller windows are gone
    assert len(buffers._take(2 * MB)) < 4 * MB  # a much larger buffer is not spent on it
    taken = [buffers.empty((20 * MB,), np.dtype(np.uint8)) for _ in range(9)]
    del taken
    buffers._take(20 * MB)
    assert len(buffers._free) <= 4


def test_the_sampler_lets_a_window_go_before_it_asks_for_the_next_one():
    alive: list[weakref.ref[np.ndarray]] = []
    held: list[int] = []

    def read(windows):
        for window in windows:
            held.append(sum(ref() is not None for ref in alive))
            row = np.arange(sum(s.count for s in window))
            alive.append(weakref.ref(row))
            given = {"row": row}
            del row
            yield given
            del given

    sampler = RowSampler([(f"s{i}", 40) for i in range(12)], read, batch=16, window_rows=80)
    batches = list(sampler.batches(0, 60))
    assert all(len(batch["row"]) == 16 for batch in batches)
    assert len(held) > 10
    assert not any(held)


def test_slices_say_how_many_rows_a_window_has():
    assert sum(s.count for s in [Slice("a", 10), Slice("b", 10, 1, 2), Slice("c", 12, 1, 3, 2)]) == 10 + 5 + 4
