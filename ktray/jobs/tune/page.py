"""``tune.html``, which opens offline, its figures as PNG files, and ``tune.csv``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ktray.jobs.compare.figure import metric_name
from ktray.jobs.tune import figure
from ktray.jobs.tune.random_draw import sentence
from ktray.jobs.tune.records import TrialPoint
from ktray.jobs.tune.winner import title
from ktray.reporting import page

COLUMNS = ("trial", "state", "steps", "share", "validation", "flops", "device_seconds", "usd", "run", "pareto")


def write(folder: Path, content: dict[str, Any], files: dict[str, str]) -> list[Path]:
    """Write the page, its figures and the CSV file into ``folder``; returns their paths.

    Args:
        content: the content of ``result.json``.
        files: file name of the recipe of each run of the Pareto set, by run id.
    """
    keys = list(dict.fromkeys(key for trial in content["trials"] for key in trial["params"]))
    return page.write(
        folder,
        "tune",
        "ktray.jobs.tune",
        {
            "tune": figure.front(content),
            "parallel": figure.parallel(content),
            "importance": figure.importance(content),
        },
        [*COLUMNS, *keys],
        rows(content),
        {},
        f=content,
        metric=metric_name(content),
        files=files,
        titles={p["run"]: title(TrialPoint(**p)) for p in content["front"]},
        values=_value,
        random_draw=sentence(draw, content["winner"]["validation"]) if (draw := content.get("random_draw")) else "",
    )


def rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one flat row for each run of each trial."""
    front = {p["run"] for p in content["front"]}
    out = []
    for trial in content["trials"]:
        for p in trial["points"]:
            out.append({**p["whole"], **trial["params"], **p, "state": trial["state"], "pareto": p["run"] in front})
    return out


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
