"""What a run spent, from the entries of its ledger: the objects ``cost`` and ``stages`` of ``result.json``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ktray.accounting.attempts import Entry

STAGES = ("adapt", "index", "curate", "teach", "transfer", "finetune", "evaluate")
# Decoding the labelled images counts for the stage that needs them first; suggestions are made by jobs/curate.py.
PART_OF = {"labels": "adapt", "suggest": "curate"}


def cost_summary(entries: Iterable[Entry], stages: Sequence[str] = STAGES) -> dict[str, Any]:
    """The ``cost`` object of ``result.json``.

    ``flops`` and ``device_seconds`` have a key for each stage, including ``evaluate``, and their ``total``. Entries of
    any other stage (a baseline such as ``scratch``, or ``hygiene``) are not part of the method: they are under
    ``baselines`` and in no total but ``with_baselines``, which is what was spent. ``usd`` is None if a price is not
    known, ``kwh`` if nothing was measured. ``without_cache`` also has the original cost of the reused stages.

    Args:
        stages: the stages of the method; another job than those of the pipeline has its own.
    """
    all_entries = [replace(e, stage=PART_OF.get(e.stage, e.stage)) for e in entries]
    method = [e for e in all_entries if e.stage in stages]
    spent = [e for e in method if not e.cached]
    others = [e for e in all_entries if e.stage not in stages]
    return {
        "flops": _by_stage(spent, "flops", stages),
        "device_seconds": _by_stage(spent, "device_seconds", stages),
        "wall_seconds": sum(e.wall_seconds for e in spent),
        "usd": _money(spent),
        "kwh": _energy(spent),
        "images_seen": sum(e.images for e in spent),
        "peak_memory_bytes": max((e.peak_memory_bytes for e in spent), default=0),
        "without_cache": _totals(method),
        "baselines": {s: _totals([e for e in others if e.stage == s]) for s in dict.fromkeys(e.stage for e in others)},
        "with_baselines": _totals([e for e in all_entries if not e.cached]),
    }


def stage_rows(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """The ``stages`` list of ``result.json``, in the order of the first entries; numbers are what this run spent."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.stage, entry.key), []).append(entry)
    rows = []
    for (stage, key), group in groups.items():
        spent = [e for e in group if not e.cached]
        rows.append(
            {
                "name": stage,
                "key": key,
                "cached": not spent,
                "attempts": max(e.attempt for e in group),
                "restarts": sum(e.restarts for e in group),
                "wall_seconds": sum(e.wall_seconds for e in spent),
                "flops": sum(e.flops for e in spent),
                "lost_flops": sum(e.lost_flops for e in spent),
                "device_seconds": sum(e.device_seconds for e in spent),
                "images": sum(e.images for e in spent),
                "usd": _money(spent),
            }
        )
    return rows


def _by_stage(spent: list[Entry], what: str, stages: Sequence[str]) -> dict[str, Any]:
    sums = {stage: sum(getattr(e, what) for e in spent if e.stage == stage) for stage in stages}
    return {**sums, "total": sum(sums.values())}


def _totals(entries: list[Entry]) -> dict[str, Any]:
    return {
        "flops": sum(e.flops for e in entries),
        "device_seconds": sum(e.device_seconds for e in entries),
        "usd": _money(entries),
    }


def _money(entries: list[Entry]) -> float | None:
    priced = [e.usd for e in entries if e.usd is not None]
    return sum(priced) if len(priced) == len(entries) else None


def _energy(entries: list[Entry]) -> float | None:
    measured = [e.kwh for e in entries if e.kwh is not None]
    return sum(measured) if measured else None
