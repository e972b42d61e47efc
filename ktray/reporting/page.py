"""Write the pages about several runs (``compare.html``, ``tune.html``). They contain their style and pictures, so they
open offline; the pictures and a CSV are also written as files."""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ktray.reporting.units import flops, percent, seconds, usd


def write(
    folder: Path,
    name: str,
    package: str,
    pictures: Mapping[str, bytes | None],
    columns: Sequence[str],
    rows: Iterable[Mapping[str, Any]],
    filters: Mapping[str, Callable[..., str]],
    **values: Any,
) -> list[Path]:
    """Write the pictures, the CSV and the page into ``folder``; returns their paths.

    Args:
        name: name of the page, of the CSV and of the template in ``package``, without file extensions.
        pictures: PNG data by name; None where there is nothing to draw. The picture with the name of the page becomes
            ``NAME.png``, the others ``NAME-OTHER.png``. The template gets them as ``picture``, ready for an ``img``.
        columns: columns of the CSV; other entries of the rows are left out.
        filters: filters of the template, in addition to those for amounts.
        values: further values for the template.
    """
    paths = []
    for other, png in pictures.items():
        if png is not None:
            paths.append(folder / (f"{name}.png" if other == name else f"{name}-{other}.png"))
            paths[-1].write_bytes(png)
    paths.append(folder / f"{name}.csv")
    with open(paths[-1], "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"flops": flops, "seconds": seconds, "usd": usd, "percent": percent, **filters}
    template = environment.from_string(resources.files(package).joinpath(f"{name}.html").read_text("utf-8"))
    shown = {
        other: png and f"data:image/png;base64,{base64.b64encode(png).decode()}" for other, png in pictures.items()
    }
    # The style is ktray's own, so it needs no escaping.
    style = Markup(resources.files("ktray.reporting").joinpath("study.css").read_text("utf-8"))
    paths.append(folder / f"{name}.html")
    paths[-1].write_text(template.render(style=style, picture=shown, **values), encoding="utf-8")
    return paths
