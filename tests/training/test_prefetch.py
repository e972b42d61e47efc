"""Batches on their way to a device. `test_watchdog.py` tests the thread that reads them ahead."""

import pytest
import torch

from ktray.training.prefetch import on_device


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
