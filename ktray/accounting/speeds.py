"""Speeds that were measured: by earlier runs and by ``jobs/bench.py``, which leave them in ``speeds/`` of the store,
and those that ktray ships.

A speed belongs to a stage with everything that its time for an image depends on (models, sizes, batch, precision,
device), and consists of device-seconds for each image, and device-seconds that do not depend on the number of images.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import lru_cache
from importlib import resources
from typing import Any, Protocol

import yaml

from ktray.accounting.roofline import family

_MOST = 20  # runs of which a speed is computed
STORE, BENCH, SHIPPED = "store", "bench", "table"
_BY_BENCH = f".{BENCH}.json"  # how names of files end that jobs/bench.py wrote


class SpeedFolder(Protocol):
    """The part of `ktray.storage.store.Dir` that `Speeds` needs."""

    def sub(self, name: str) -> Any: ...

    def names(self, suffix: str = "") -> Mapping[str, int]: ...

    def children(self) -> list[str]: ...

    def read_json(self, name: str) -> Any: ...

    def write_json(self, name: str, value: Any) -> None: ...


@dataclass(frozen=True)
class Speed:
    """The device-seconds of a stage: ``fixed + per_image * images + per_flop * flops``.

    Attributes:
        runs: number of runs that it was measured in.
        source: ``store``: runs with this store; ``bench``: ``jobs/bench.py`` with this store; ``table``: ktray's table.
        per_flop: device-seconds for each FLOP, for a speed that was measured with other work than that of the stage.
    """

    fixed: float
    per_image: float
    runs: int = 1
    source: str = STORE
    per_flop: float = 0.0

    def device_seconds(self, images: float, flops: float = 0.0) -> float:
        return self.fixed + self.per_image * images + self.per_flop * flops


@dataclass(frozen=True)
class Measured:
    """A run of a stage: the images that it processed, the device-seconds that this took, and the part of them before
    the first image (0: not known)."""

    images: float
    device_seconds: float
    start: float = 0.0


def fit(runs: Sequence[Measured]) -> Speed | None:
    """The line with the smallest sum of squared relative errors, with neither part negative; None without a run.

    Runs of one length do not show a line; then the fixed part is the start that they measured.
    """
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
    fixed = sum(w * min(run.start, run.device_seconds) for w, run in zip(weights, runs, strict=True)) / total
    squares = sum(w * run.images**2 for w, run in zip(weights, runs, strict=True))
    products = sum(w * run.images * (run.device_seconds - fixed) for w, run in zip(weights, runs, strict=True))
    if products > 0:
        return Speed(fixed, products / squares, len(runs))
    return Speed(mean_y, 0.0, len(runs))


class Speeds:
    """The speeds in a store.

    Args:
        folder: the folder ``speeds`` of the store.
    """

    def __init__(self, folder: SpeedFolder) -> None:
        self.folder = folder

    def known(self, facts: Mapping[str, Any]) -> Speed | None:
        """The speed of a stage with these facts: that of runs with this store, else that of ``jobs/bench.py``, else
        that of ktray's table.

        Args:
            facts: ``stage``, ``device``, and everything else that the time for an image depends on. As the device,
                `ktray.accounting.roofline.family` of a GPU stands for all GPUs of this family.
        """
        place = self._place(facts)
        devices = [place.sub(name) for name in place.children() if _same_device(name, str(facts["device"]))]
        for source in (STORE, BENCH):
            files = sorted(
                (name, number)
                for number, device in enumerate(devices)
                for name in device.names(".json")
                if name.endswith(_BY_BENCH) == (source == BENCH)
            )
            found = fit([Measured(**devices[number].read_json(name)["measured"]) for name, number in files[-_MOST:]])
            if found:
                return replace(found, source=source)
        return shipped(facts)

    def record(
        self, facts: Mapping[str, Any], measured: Measured, at: str, bench: bool = False, part_of: str = ""
    ) -> None:
        """Keep what was measured.

        Args:
            at: begins the name of the file, so that names sort by time.
            bench: whether ``jobs/bench.py`` measured it, and not a run.
            part_of: name of the work that this is a part of. Its parts count as one measurement, as in a plan: only the
                first one starts processes.
        """
        place = self._place(facts).sub(_folder_name(str(facts["device"])))
        ending = f"-{part_of or uuid.uuid4().hex[:6]}{_BY_BENCH if bench else '.json'}"
        name = f"{at}{ending}"
        for earlier in [found for found in place.names(".json") if part_of and found.endswith(ending)]:
            before = Measured(**place.read_json(earlier)["measured"])
            parts = zip(astuple(before), astuple(measured), strict=True)
            name, measured = earlier, Measured(*(one + other for one, other in parts))
        place.write_json(name, {"facts": dict(facts), "measured": asdict(measured)})

    def _place(self, facts: Mapping[str, Any]) -> Any:
        text = json.dumps({name: value for name, value in facts.items() if name != "device"}, sort_keys=True)
        return self.folder.sub(f"{facts['stage']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}")


def _folder_name(device: str) -> str:
    """The name of a device as the name of a folder on every file system."""
    return re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-") or "-"


def _same_device(folder: str, asked: str) -> bool:
    return folder == _folder_name(asked) or (asked == family(asked) and family(folder) == asked)


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    text = resources.files("ktray.accounting").joinpath("speeds.yaml").read_text()
    tables: dict[str, Any] = yaml.safe_load(text)
    return tables


def shipped_start(stage: str) -> float:
    """Seconds of a stage before its first image on CPU cores, in ktray's table: its processes start and load models."""
    return float(_table()["starts"].get(stage, 0.0))


def shipped(facts: Mapping[str, Any]) -> Speed | None:
    """The speed in ktray's table for the ``stage``, ``model``, ``size`` and ``device`` of ``facts``; None if there is
    none.

    The table has the speed of one model alone. So the FLOPs of the stage count, because an objective may take more than
    one step for an image; and the table says nothing about a training in which a teacher runs too. A model with another
    set of weights (after a dot or a slash of its name) is as fast.
    """
    if facts.get("mode", "cached") != "cached":
        return None
    model, gpu = str(facts.get("model")), family(str(facts.get("device", "")))
    for row in _table()["speeds"]:
        same = facts.get("stage") in row["stages"] and facts.get("size") == row["size"] and gpu == row["device"]
        if same and re.split(r"[./]", model)[0] == row["model"]:
            rate = float(row["images_per_second"]) * float(row["flops_per_image"])
            return Speed(0.0, 0.0, 1, SHIPPED, 1 / rate)
    return None
