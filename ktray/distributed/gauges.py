"""Gauges of running jobs on Ray's metrics port, where Prometheus reads them.

Ray exports the gauges of every process of a cluster at the metrics port of its node; the folder of its session has the
addresses for Prometheus (``metrics/prometheus``, ``prom_metrics_service_discovery.json``). There, names start with
``ray_ktray_``.
Without a connection to Ray, values are dropped. `cluster/grafana/ktray.json` is a dashboard for them.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ktray.accounting.ledger import Ledger

# By name, the description and the labels.
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "images_per_second": ("Images that a stage processes in a second", ("run", "stage")),
    "images": ("Images that a stage has processed", ("run", "stage")),
    "step": ("Steps that a training has done", ("run", "stage")),
    "data_wait_ratio": ("Share of the time in which a training waits for data, 0 to 1", ("run", "stage")),
    "loss": ("Loss of a training", ("run", "stage")),
    "validation": ("Metric of a training on validation, 0 to 1", ("run", "stage", "metric")),
    "spent_usd": ("Money that a run has spent, in USD", ("run",)),
    "budget_left_ratio": ("Share of the budget of a search that is left, 0 to 1", ("run", "unit")),
}
PREFIX = "ktray_"
_WINDOW_S = 5.0  # shortest time over which a rate is computed
_COUNT_S = 10.0  # shortest time between two counts of what a run has spent


def put(name: str, value: float | None, **labels: str) -> None:
    """Set a gauge of `GAUGES`. None and values that are not finite are dropped.

    Args:
        labels: a value for each label of the gauge.
    """
    import ray

    if value is not None and math.isfinite(value) and ray.is_initialized():
        _gauge(name).set(float(value), tags=labels)


@lru_cache
def _gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    description, labels = GAUGES[name]
    return Gauge(f"{PREFIX}{name}", description=description, tag_keys=labels)


class StageGauges:
    """The gauges of one attempt at a stage. Its methods may be called from any thread."""

    def __init__(self, run: str, stage: str) -> None:
        self._labels = {"run": run, "stage": stage}
        self._lock = threading.Lock()
        self._since, self._images = time.monotonic(), 0.0
        self._counted = -math.inf

    def images(self, total: float) -> None:
        """Set the number of images that are processed, and their rate since the last call that set it."""
        put("images", total, **self._labels)
        with self._lock:
            elapsed = time.monotonic() - self._since
            if elapsed < _WINDOW_S:
                return
            rate = max(0.0, total - self._images) / elapsed
            self._since, self._images = time.monotonic(), total
        put("images_per_second", rate, **self._labels)

    def training(self, step: int, images: float, data_wait: float | None) -> None:
        """Set the progress of a training; ``images`` is the total up to the step."""
        put("step", step, **self._labels)
        put("data_wait_ratio", data_wait, **self._labels)
        self.images(images)

    def resume(self, images: float) -> None:
        """Start the rate of a training anew, from its total at a start of workers."""
        with self._lock:
            self._since, self._images = time.monotonic(), images

    def evaluation(self, values: Mapping[str, float]) -> None:
        """Set the loss, and the metrics on validation, from the names of a curve: ``loss`` and ``val_...``."""
        put("loss", values.get("loss"), **self._labels)
        for name, value in values.items():
            if name.startswith("val_"):
                put("validation", value, metric=name.removeprefix("val_"), **self._labels)

    def spent(self, ledger: Ledger) -> None:
        """Set what the run has spent, unless a device has no price. It is counted now and then, not at each call."""
        now = time.monotonic()
        if now - self._counted < _COUNT_S:
            return
        self._counted = now
        prices = [entry.usd for entry in ledger.spent()]
        known = [usd for usd in prices if usd is not None]
        if len(known) == len(prices):
            put("spent_usd", sum(known), run=self._labels["run"])

    def end(self) -> None:
        """Set the rates to 0, so that a finished stage does not seem to work."""
        put("images_per_second", 0.0, **self._labels)
        put("data_wait_ratio", 0.0, **self._labels)
