"""Speeds that were measured: by earlier runs, which leave them in ``speeds/`` of the store, and those that ktray ships.

A speed belongs to a stage with everything that its time for an image depends on (models, sizes, batch, precision,
device), and consists of device-seconds for each image, and device-seconds that do not depend on the number of images.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, Protocol

import yaml

_MOST = 20  # runs of which a speed is computed
STORE, SHIPPED = "store", "table"


class SpeedFolder(Protocol):
    """The part of `ktray.storage.store.Dir` that `Speeds` needs."""

    def sub(self, name: str) -> Any: ...

    def names(self, suffix: str = "") -> Mapping[str, int]: ...

    def read_json(self, name: str) -> Any: ...

    def write_json(self, name: str, value: Any) -> None: ...


@dataclass(frozen=True)
class Speed:
    """The device-seconds of a stage: ``fixed + per_image * images``.

    Attributes:
        runs: number of runs that it was measured in.
        source: ``store``: runs with this store; ``table``: ktray's table.
    """

    fixed: float
    per_image: float
    runs: int = 1
    source: str = STORE

    def device_seconds(self, images: float) -> float:
        return self.fixed + self.per_image * images


@dataclass(frozen=True)
class Measured:
    """A run of a stage: the images that it processed, and the device-seconds that this took."""

    images: float
    device_seconds: float


def fit(runs: Sequence[Measured]) -> Speed | None:
    """The line with the smallest sum of squared relative errors, with neither part negative; None without a run."""
    runs = [run for run in runs if run.images > 0 and run.device_seconds > 0]
    if not runs:
        return None
    # Relative errors, because a plan should be right by a factor for few and for many images.
    weights = [1 / run.device_seconds**2 for run in runs]
    total, mean_x, mean_y = sum(weights), 0.0, 0.0
    mean_x = sum(w * run.images for w, run in zip(weights, runs, strict=True)) / total
    mean_y = sum(w * run.device_seconds for w, run in zip(weights, runs, strict=True)) / total
    spread = sum(w * (run.images - mean_x) ** 2 for w, run in zip(weights, runs, strict=True))
    joint = sum(w * (run.images - mean_x) * (run.device_seconds - mean_y) for w, run in zip(weights, runs, strict=True))
    slope = joint / spread if spread > 1e-9 * total * mean_x**2 else 0.0
    fixed = mean_y - slope * mean_x
    if slope > 0 and fixed >= 0:
        return Speed(fixed, slope, len(runs))
    # Through the origin: also for a single run, whose start-up time is not known.
    squares = sum(w * run.images**2 for w, run in zip(weights, runs, strict=True))
    products = sum(w * run.images * run.device_seconds for w, run in zip(weights, runs, strict=True))
    return Speed(0.0, products / squares, len(runs))


class Speeds:
    """The speeds in a store.

    Args:
        folder: the folder ``speeds`` of the store.
    """

    def __init__(self, folder: SpeedFolder) -> None:
        self.folder = folder

    def known(self, facts: Mapping[str, Any]) -> Speed | None:
        """The speed of a stage with these facts: that of runs with this store, else that of ktray's table."""
        place = self._place(facts)
        names = list(place.names(".json"))[-_MOST:]
        runs = [Measured(**place.read_json(name)["measured"]) for name in names]
        return fit(runs) or shipped(facts)

    def record(self, facts: Mapping[str, Any], measured: Measured, at: str) -> None:
        """Keep what a run measured. ``at`` begins the name of the file, so that names sort by time."""
        content = {"facts": dict(facts), "measured": asdict(measured)}
        self._place(facts).write_json(f"{at}-{uuid.uuid4().hex[:6]}.json", content)

    def _place(self, facts: Mapping[str, Any]) -> Any:
        text = json.dumps(facts, sort_keys=True)
        return self.folder.sub(f"{facts['stage']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}")


@lru_cache(maxsize=1)
def _table() -> list[dict[str, Any]]:
    text = resources.files("ktray.accounting").joinpath("speeds.yaml").read_text()
    rows: list[dict[str, Any]] = yaml.safe_load(text)["speeds"]
    return rows


def shipped(facts: Mapping[str, Any]) -> Speed | None:
    """The speed in ktray's table with the ``stage``, ``model`` and ``size`` of ``facts``, whose ``device`` is part of
    the device's name; None if there is none."""
    for row in _table():
        same = all(facts.get(name) == row[name] for name in ("stage", "model", "size"))
        if same and row["device"].lower() in str(facts.get("device", "")).lower():
            return Speed(0.0, 1 / float(row["images_per_second"]), 1, SHIPPED)
    return None
