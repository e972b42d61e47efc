"""Batches that a thread reads ahead: the same in the same order, with the errors of the source, and an end."""

import threading
import time

import pytest
import torch

from ktray.training.prefetch import AHEAD, _read_ahead, on_device


def test_items_come_in_order_and_changed():
    assert list(_read_ahead(iter(range(20)), lambda n: n * n)) == [n * n for n in range(20)]
    assert list(_read_ahead(iter(()), lambda n: n)) == []


def test_an_error_of_the_source_is_raised_where_it_is_read():
    def broken():
        yield 1
        raise OSError("the store is gone")

    stream = _read_ahead(broken(), lambda n: n)
    assert next(stream) == 1
    with pytest.raises(OSError, match="the store is gone"):
        next(stream)


def test_no_more_is_read_than_is_needed_and_the_thread_ends():
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield read[-1]

    before = threading.active_count()
    stream = _read_ahead(endless(), lambda n: n)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.5)
    assert len(read) <= 3 + AHEAD + 2  # those that wait, and the one that the thread holds
    stream.close()
    until = time.time() + 5
    while threading.active_count() > before and time.time() < until:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_on_a_cpu_nothing_changes():
    batches = iter([{"x": torch.zeros(1)}])
    assert on_device(batches, torch.device("cpu")) is batches


@pytest.mark.gpu
def test_on_a_gpu_the_batches_are_the_same_and_a_step_does_not_wait():
    sent = [{"x": torch.full((64, 3, 32, 32), i, dtype=torch.uint8), "key": torch.tensor([i])} for i in range(9)]
    stream = on_device(iter(sent), torch.device("cuda"), stay=("key",))
    got = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in stream:
            assert batch["key"].device.type == "cpu"
            got.append(batch["x"].float().mean())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [float(value) for value in got] == list(range(9))
