"""``tune.html``, which opens offline, with its pictures as PNG beside it, and ``tune.csv``."""

from __future__ import annotations

import base64
import csv
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from ktray.comparison.picture import metric_name
from ktray.report import flops, percent, seconds, usd
from ktray.tuning import picture
from ktray.tuning.records import Point
from ktray.tuning.winner import title

COLUMNS = ("trial", "state", "steps", "share", "validation", "flops", "device_seconds", "usd", "run", "pareto")


def write(folder: Path, found: dict[str, Any], files: dict[str, str]) -> list[Path]:
    """Write the page, its pictures and the CSV into ``folder``; returns their paths.

    Args:
        files: by run of the Pareto set, the name of its recipe beside the page.
    """
    images = {
        "front": picture.front(found),
        "parallel": picture.parallel(found),
        "importance": picture.importance(found),
    }
    paths = []
    for name, png in images.items():
        if png is not None:
            paths.append(folder / ("tune.png" if name == "front" else f"tune-{name}.png"))
            paths[-1].write_bytes(png)
    paths.append(folder / "tune.csv")
    keys = list(dict.fromkeys(key for trial in found["trials"] for key in trial["params"]))
    with open(paths[-1], "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *keys], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows(found))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"flops": flops, "seconds": seconds, "usd": usd, "percent": percent}
    text = resources.files("ktray.tuning").joinpath("tune.html").read_text("utf-8")
    shown = {name: png and "data:image/png;base64," + base64.b64encode(png).decode() for name, png in images.items()}
    html = environment.from_string(text).render(
        f=found,
        picture=shown,
        metric=metric_name(found),
        files=files,
        titles={p["run"]: title(Point(**p)) for p in found["front"]},
        values=_value,
    )
    paths.append(folder / "tune.html")
    paths[-1].write_text(html, encoding="utf-8")
    return paths


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
