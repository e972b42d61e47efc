"""What the rehearsal saw, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rehearsal.draw import Counts
from rehearsal.watch import StageSeen

LIMIT = 3 << 30
DRIVER = 0.10
# Memory may differ by this much between two equal runs.
NOISE = 200 << 20
_HEAD = ("Stage", "Seconds", "Driver's share", "Largest process", "Object store")


def text(tenth: Counts, whole: Counts, found: dict[str, list[Any]], counted: list[dict[str, Any]]) -> str:
    """All tables. ``found`` has the jobs at a tenth of the counts, at the whole counts, and perhaps on S3."""
    out = ["# Rehearsal", "", _counts(tenth, whole), ""]
    for name, jobs in found.items():
        for job in jobs:
            out += [f"## {job.name}, {name}", "", *_facts(job), "", *_stages(job.stages), ""]
    out += ["## Memory at the whole counts and at a tenth", "", *_growth(found), ""]
    out += ["## The driver's work at 15 million images and 100 epochs", "", *_dry(counted), ""]
    return "\n".join(out)


def _counts(tenth: Counts, whole: Counts) -> str:
    rows = [_row(["Images", "A tenth", "Whole"]), _row(["---"] * 3)]
    rows += [_row([name, f"{getattr(tenth, name):,}", f"{value:,}"]) for name, value in vars(whole).items()]
    return "\n".join(rows)


def _facts(job: Any) -> list[str]:
    lines = [f"Exit code {job.code}, {job.seconds:.0f} s."]
    if job.first_batch is not None:
        lines.append(f"First progress of TRANSFER {job.first_batch:.1f} s after its first line.")
    if job.requests:
        lines.append("Requests: " + ", ".join(f"{count:,} {kind}" for kind, count in job.requests.items()) + ".")
    if job.result:
        lines.append(f"Test metric: {job.result.get('metric', {}).get('test')}.")
    return lines


def _stages(stages: dict[str, StageSeen]) -> Iterable[str]:
    yield _row(_HEAD)
    yield _row(["---"] * len(_HEAD))
    for name, seen in stages.items():
        role, sizes = max(seen.memory.items(), key=lambda item: item[1][1], default=("", [0, 0, 0]))
        late = " (!)" if seen.driver_share > DRIVER else ""
        large = " (!)" if sizes[1] > LIMIT else ""
        yield _row(
            [
                name,
                f"{seen.seconds:.0f}",
                f"{100 * seen.driver_share:.0f}%{late}",
                f"{role}: {_bytes(sizes[1])}{large}",
                _bytes(seen.shared),
            ]
        )


def _growth(found: dict[str, list[Any]]) -> Iterable[str]:
    """By role, the largest process at both counts; ten times the counts would add what is seen here ten times more."""
    yield _row(["Process", "A tenth", "Whole", "Grows with the counts", "Whole counts x 10", "x 100"])
    yield _row(["---"] * 6)
    sizes = {name: _largest(jobs) for name, jobs in found.items()}
    for role in sorted(sizes["whole"], key=lambda role: -sizes["whole"][role]):
        small, large = sizes["tenth"].get(role), sizes["whole"][role]
        if small is None:
            continue
        grown = max(0, large - small)
        # A line through both points, where the difference is more than two equal runs show.
        each = grown / 0.9 if grown > NOISE else 0
        yield _row(
            [
                role,
                _bytes(small),
                _bytes(large),
                "yes" if each else "no",
                *(_bytes(large + (factor - 1) * each) for factor in (10, 100)),
            ]
        )


def _largest(jobs: list[Any]) -> dict[str, int]:
    largest: dict[str, int] = {}
    for job in jobs:
        for seen in job.stages.values():
            for role, (_, most, _) in seen.memory.items():
                largest[role] = max(largest.get(role, 0), most)
    return largest


def _dry(counted: list[dict[str, Any]]) -> Iterable[str]:
    yield _row(["Part", "Counts", "Seconds", "Memory"])
    yield _row(["---"] * 4)
    for row in counted:
        yield _row([row["part"], row["what"], f"{row['seconds']:.1f}", _bytes(row["memory"])])


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _bytes(size: float) -> str:
    return f"{size / (1 << 20):,.0f} MB"
