"""The costs of the runs of a comparison: by stage, the teacher's share, and the savings by shared stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ktray.accounting.attempts import DirLog, attempts
from ktray.accounting.summary import PART_OF, STAGES
from ktray.storage.store import Store

TEACHER = ("adapt", "index", "curate", "teach")  # stages in which the teacher works, before any student is trained


def by_stage(store: Store, result: dict[str, Any]) -> dict[str, float]:
    """Return the FLOPs of each stage that a run's student needed. A reused stage counts with what it cost when it was
    computed."""
    kinds = store.sub("stages").children()
    flops_of: dict[str, float] = {}
    for row in result["stages"]:
        # The row's name is the one that its cost is booked under, which can differ from the name of its folder.
        folder = next((k for k in (row["name"], *kinds) if store.stage(k, row["key"]).exists()), None)
        if folder is None:
            continue
        name = PART_OF.get(row["name"], row["name"])
        if name not in STAGES:  # a baseline or a check of the labels, which the student does not need
            continue
        flops_of[name] = flops_of.get(name, 0.0) + sum(
            e.flops for e in attempts(DirLog(store.stage(folder, row["key"])).read())
        )
    return {name: flops_of[name] for name in STAGES if name in flops_of}


def teacher_share(stages: dict[str, float]) -> float:
    """Return the share of the FLOPs, 0..1, of the stages in which the teacher works (`TEACHER`)."""
    total = sum(stages.values())
    return sum(v for k, v in stages.items() if k in TEACHER) / total if total else 0.0


def totals(results: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return the FLOPs and device-seconds that runs spent, and what they would have cost without shared stages."""
    runs = list(results)
    return {
        "flops": float(sum(r["cost"]["flops"]["total"] for r in runs)),
        "flops_without_cache": float(sum(r["cost"]["without_cache"]["flops"] for r in runs)),
        "device_seconds": float(sum(r["cost"]["device_seconds"]["total"] for r in runs)),
        "device_seconds_without_cache": float(sum(r["cost"]["without_cache"]["device_seconds"] for r in runs)),
    }
