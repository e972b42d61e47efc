"""``tune.html``, which opens offline, with its pictures as PNG beside it, and ``tune.csv``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ktray import study_page
from ktray.comparison.picture import metric_name
from ktray.tuning import picture
from ktray.tuning.records import Point
from ktray.tuning.winner import title

COLUMNS = ("trial", "state", "steps", "share", "validation", "flops", "device_seconds", "usd", "run", "pareto")


def write(folder: Path, found: dict[str, Any], files: dict[str, str]) -> list[Path]:
    """Write the page, its pictures and the CSV into ``folder``; returns their paths.

    Args:
        files: by run of the Pareto set, the name of its recipe beside the page.
    """
    keys = list(dict.fromkeys(key for trial in found["trials"] for key in trial["params"]))
    return study_page.write(
        folder,
        "tune",
        "ktray.tuning",
        {
            "tune": picture.front(found),
            "parallel": picture.parallel(found),
            "importance": picture.importance(found),
        },
        [*COLUMNS, *keys],
        rows(found),
        {},
        f=found,
        metric=metric_name(found),
        files=files,
        titles={p["run"]: title(Point(**p)) for p in found["front"]},
        values=_value,
    )


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A flat row for each run of each trial."""
    front = {p["run"] for p in found["front"]}
    out = []
    for trial in found["trials"]:
        for p in trial["points"]:
            out.append({**p["whole"], **trial["params"], **p, "state": trial["state"], "pareto": p["run"] in front})
    return out


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
