"""What a stage's time for an image depends on, and the speeds that runs measure."""

from __future__ import annotations

import contextlib
from typing import Any

from ktray.accounting.ledger import Entry
from ktray.accounting.speeds import Measured, Speed, Speeds
from ktray.stages.inputs import StageInputs
from ktray.storage.clock import stamp
from ktray.storage.store import Store

FOLDER = "speeds"


def known_speed(store: Store, inputs: StageInputs, device: str) -> Speed | None:
    """The speed of a stage on a device (`ktray.accounting.device.device_name`); None if it was not measured."""
    facts = _facts(inputs, device)
    return Speeds(store.sub(FOLDER)).known(facts) if facts else None


def keep_speed(store: Store, inputs: StageInputs, device: str, entry: Entry) -> None:
    """Keep what a finished attempt measured, for plans of later runs with this store."""
    facts = _facts(inputs, device)
    if facts and entry.images and not entry.restarts:
        at = stamp()
        with contextlib.suppress(Exception):  # the stage is complete, and a full disk must not fail it now
            Speeds(store.sub(FOLDER)).record(facts, Measured(entry.images, entry.device_seconds), at)


def _facts(inputs: StageInputs, device: str) -> dict[str, Any]:
    own = inputs.speed
    return {"stage": inputs.stage, "device": device, **own} if own else {}
