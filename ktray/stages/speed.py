"""What a stage's time for an image depends on, and the speeds that runs measure."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ktray.accounting.attempts import Entry
from ktray.accounting.speeds import Measured, Speed, Speeds
from ktray.stages.inputs import StageInputs
from ktray.storage.clock import stamp
from ktray.storage.store import Store

FOLDER = "speeds"


@dataclass
class StageLook:
    """What a plan sees of the stages of a recipe, by their names in the ledger.

    Attributes:
        whole: whether the store holds the stage completely.
        facts: what its speed depends on besides the device; empty if its time is not planned.
    """

    whole: dict[str, bool] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def see(self, name: str, inputs: StageInputs, whole: bool) -> None:
        """Add a stage. Several stages under one name count as one, at the speed of the first."""
        self.whole[name] = whole and self.whole.get(name, True)
        self.facts.setdefault(name, _facts(inputs))


def measured_speeds(store: Store) -> Speeds:
    """The speeds that were measured with a store."""
    return Speeds(store.sub(FOLDER))


def known_speed(store: Store, inputs: StageInputs, device: str) -> Speed | None:
    """The speed of a stage on a device (`ktray.accounting.device.device_name`); None if it was not measured."""
    facts = _facts(inputs)
    return measured_speeds(store).known({**facts, "device": device}) if facts else None


def keep_speed(
    store: Store, inputs: StageInputs, device: str, entry: Entry, manifest: Mapping[str, Any], run: str
) -> None:
    """Keep what a finished attempt measured, for plans of later runs with this store.

    Args:
        run: name of the run. Its stages under one name in the ledger count as one (`StageLook.see`).
    """
    facts, images = _facts(inputs), inputs.images_worked(entry.images, manifest)
    if facts and images and not entry.restarts:
        at = stamp()
        with contextlib.suppress(Exception):  # the stage is complete, and a full disk must not fail it now
            measured = Measured(images, entry.device_seconds, entry.start_seconds)
            part_of = f"{run}-{entry.stage}"
            measured_speeds(store).record({**facts, "device": device}, measured, at, part_of=part_of)


def _facts(inputs: StageInputs) -> dict[str, Any]:
    own = inputs.speed
    return {"stage": inputs.stage, **own} if own else {}
