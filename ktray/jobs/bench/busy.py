"""The share of the time in which a GPU of this machine was busy, by NVML."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

EVERY = 0.2  # seconds between two samples; NVML averages over up to a second


@dataclass
class Busy:
    """Samples of the utilisation of the first GPU, fractions."""

    samples: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The mean of the samples; NaN without NVML."""
        return sum(self.samples) / len(self.samples) if self.samples else float("nan")


@contextlib.contextmanager
def busy_share() -> Iterator[Busy]:
    """Sample the utilisation while the block runs."""
    busy, ended = Busy(), threading.Event()
    try:
        import pynvml

        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:  # there is no GPU or no NVML
        yield busy
        return

    def sample() -> None:
        while not ended.wait(EVERY):
            busy.samples.append(pynvml.nvmlDeviceGetUtilizationRates(card).gpu / 100)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield busy
    finally:
        ended.set()
        thread.join()
