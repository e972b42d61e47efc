"""Batches on their way to a GPU: gathered by a thread, pinned, and copied while earlier steps run."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from ktray.distributed.watchdog import iterate_watched

Batch = dict[str, torch.Tensor]
AHEAD = 2  # batches that are copied before they are needed; one more waits in pinned memory


def on_device(batches: Iterator[Batch], device: torch.device, stay: tuple[str, ...] = ()) -> Iterator[Batch]:
    """The batches on a device, in order.

    On a GPU, a thread reads the batches into pinned memory, and a stream of its own copies them, so that a step waits
    neither for a copy nor for the host. On a CPU, nothing changes.

    Args:
        batches: batches on the CPU.
        stay: columns that stay on the CPU.
    """
    if device.type != "cuda":
        return batches

    def pinned(batch: Batch) -> Batch:
        return {name: value if name in stay else value.pin_memory() for name, value in batch.items()}

    ahead = iterate_watched(lambda: map(pinned, batches), lambda: None)
    return _copied(ahead, device, stay)


def _copied(batches: Iterator[Batch], device: torch.device, stay: tuple[str, ...]) -> Iterator[Batch]:
    side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    moving: deque[tuple[Batch, Any]] = deque()

    def start() -> bool:
        batch = next(batches, None)
        if batch is None:
            return False
        with torch.cuda.stream(side):
            moved = {k: v if k in stay else v.to(device, non_blocking=True) for k, v in batch.items()}
        moving.append((moved, side.record_event()))
        return True

    while len(moving) < AHEAD and start():
        pass
    while moving:
        batch, done = moving.popleft()
        current.wait_event(done)
        for name, value in batch.items():
            if name not in stay:
                value.record_stream(current)
        start()
        yield batch
