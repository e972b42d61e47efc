"""What the pages of several runs have in common (``compare.html``, ``tune.html``): they open offline, with their style
and pictures inside; the pictures and a CSV lie beside them."""

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
        name: of the page, of the CSV and of its template in ``package``, without their endings.
        pictures: PNG by name, None where there is nothing to draw; the one that bears the page's name is ``NAME.png``,
            others ``NAME-OTHER.png``. The template has them as ``picture``, ready for an ``img``.
        columns: of the CSV; what else the rows hold is left out.
        filters: of the template, beside those for amounts.
        values: what else the template uses.
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
    # Ours, so there is nothing to escape.
    style = Markup(resources.files("ktray.reporting").joinpath("study.css").read_text("utf-8"))
    paths.append(folder / f"{name}.html")
    paths[-1].write_text(template.render(style=style, picture=shown, **values), encoding="utf-8")
    return paths
