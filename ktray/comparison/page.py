"""``compare.html``, ``compare.png``, ``compare.csv`` and the table for the terminal."""

from __future__ import annotations

import base64
import csv
import io
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, PercentFormatter

from ktray.report import flops, percent, seconds, usd

# Colour-blind safe (Okabe and Ito); the marker repeats what the colour says.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6a00", "#56b4e9", "#4a5560", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
COLUMNS = (
    "name", "accuracy", "spread", "low", "high", "validation", "flops", "device_seconds", "usd", "steps", "seeds",
)  # fmt: skip


def write(folder: Path, found: dict[str, Any]) -> list[Path]:
    """Write the three files into ``folder``; returns their paths."""
    png = picture(found)
    (folder / "compare.png").write_bytes(png)
    with open(folder / "compare.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(found["ways"])
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters |= {"flops": flops, "seconds": seconds, "usd": usd, "percent": percent}
    text = resources.files("ktray.comparison").joinpath("compare.html").read_text("utf-8")
    image = "data:image/png;base64," + base64.b64encode(png).decode()
    html = environment.from_string(text).render(f=found, picture=image, remark=remark)
    (folder / "compare.html").write_text(html, encoding="utf-8")
    return [folder / name for name in ("compare.html", "compare.png", "compare.csv")]


def picture(found: dict[str, Any]) -> bytes:
    """PNG of test accuracy, with its interval, against the FLOPs of all stages, and the Pareto front."""
    ways = found["ways"]
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_xscale("log")
    front = sorted((w["flops"], w["accuracy"]) for w in ways if w["pareto"])
    axes.plot(*zip(*front, strict=True), color="#b0b7bf", linewidth=1.4, zorder=1, label="Pareto front")
    for i, way in enumerate(ways):
        low, high = way["accuracy"] - way["low"], way["high"] - way["accuracy"]
        axes.errorbar(
            way["flops"],
            way["accuracy"],
            yerr=[[max(0.0, low)], [max(0.0, high)]],
            fmt=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            markersize=8,
            capsize=3,
            label=f"{way['name']}  {way['accuracy']:.1%}",
        )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(unit="FLOP"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("compute of all stages, the teacher's included (logarithmic)")
    axes.set_ylabel("test top-1")
    axes.grid(True, color="#e3e6ea")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def remark(way: dict[str, Any]) -> str:
    """What a row says beside its numbers: who does as well for less, and by how much the chosen way leads."""
    said = []
    if way["behind_chosen"]:
        low, high = (100 * v for v in way["behind_chosen"])
        said.append(f"chosen way leads by {low:+.1f} to {high:+.1f} points")
    if way["cheaper"]:
        name, times = way["cheaper"]
        said.append(f"'{name}' is as accurate for {times:.1f}x less compute")
    return "; ".join(said)


def table(found: dict[str, Any]) -> str:
    """The comparison for a terminal, best on validation first."""
    width = max(len(w["name"]) for w in found["ways"]) + 2
    head = f"{'way':<{width}}{'test':>15}{'95% interval':>18}{'validation':>12}{'compute':>14}{'time':>10}{'money':>11}"
    out = [head, "-" * len(head)]
    for w in sorted(found["ways"], key=lambda w: -w["validation"]):
        test = f"{100 * w['accuracy']:.1f} ± {100 * w['spread']:.1f}%"
        span = f"{100 * w['low']:.1f} to {100 * w['high']:.1f}%"
        cost = f"{flops(w['flops']):>14}{seconds(w['device_seconds']):>10}{usd(w['usd']):>11}"
        out.append(f"{w['name']:<{width}}{test:>15}{span:>18}{percent(w['validation']):>12}{cost}")
    out += [f"  {w['name']}: {text}" for w in found["ways"] if (text := remark(w))]
    return "\n".join(out)
