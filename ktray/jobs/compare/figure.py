"""The figures of a comparison: accuracy against compute, accuracy against transfer set size, and compute by stage."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from ktray.accounting.summary import STAGES
from ktray.recipe.registries import OBJECTIVES
from ktray.tasks.base import metric_label

# The colour of an objective that is not installed here; other objectives define their colours. The marker depends on
# the source of the transfer set.
OTHER = "#000000"
MARKERS = {"retrieved": "o", "generic": "s", "target": "^", "none": "X"}
SPARE = "DvP*hpd<>8"
SOFT, FAINT = "#57606a", "#e3e6ea"
SHADES = {
    "adapt": "#f0c27b",
    "index": "#e69f00",
    "curate": "#b97a00",
    "teach": "#7a4f00",
    "transfer": "#0072b2",
    "finetune": "#56b4e9",
    "evaluate": "#b0b7bf",
}


def metric_name(content: dict[str, Any]) -> str:
    """Return the name of the task's metric for a reader."""
    return metric_label(str(content["metric"]))


def styles(methods: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str, bool]]:
    """Return colour, marker and whether the marker is filled, by method.

    Runs of one family have the same colour and marker; only the marker of the method itself is filled.
    """
    heads: dict[str, tuple[str, str]] = {}
    for method in methods:
        if method["family"] in heads:
            continue
        known = method["objective"] in OBJECTIVES
        colour = OBJECTIVES.get(method["objective"]).colour if known else OTHER
        wish = MARKERS.get(method["source"], "o")
        taken = {m for c, m in heads.values() if c == colour}
        heads[method["family"]] = (colour, next((m for m in (wish, *SPARE) if m not in taken), wish))
    return {w["name"]: (*heads[w["family"]], w["name"] == w["family"]) for w in methods}


def compute(content: dict[str, Any]) -> bytes:
    """Draw the test metric, with its interval, against the FLOPs of all stages, and the Pareto front; returns a PNG."""
    methods = content["ways"]
    figure = Figure(
        figsize=(9.6, max(4.6, 0.27 * len(methods) + 1.6)), dpi=150, layout="constrained", facecolor="white"
    )
    axes = figure.subplots()
    axes.set_xscale("log")
    front = sorted((w["flops"], w["accuracy"]) for w in methods if w["pareto"])
    # The front is a step function, because nothing was measured between two runs.
    x, y = zip(*front, strict=True)
    handles = axes.plot(x, y, color="#b0b7bf", linewidth=1.4, zorder=1, drawstyle="steps-post", label="Pareto front")
    teacher = content.get("teacher_metric")
    if teacher:
        label = f"adapted teacher  {teacher['test']:.1%}"
        dashed = (0, (5, 4))
        handles.append(
            axes.axhline(teacher["test"], color=SOFT, linewidth=1.2, linestyle=dashed, zorder=1, label=label)
        )
    look = styles(methods)
    for method in sorted(methods, key=lambda w: -w["accuracy"]):  # so that the legend has the order of the points
        handles.append(_point(axes, method, look[method["name"]]))
    costs = [w["flops"] for w in methods]
    _log_axis(axes, min(costs), max(costs), EngFormatter(unit="FLOP"))
    axes.set_xlabel("compute of all stages, the teacher's included (logarithmic)")
    _finish(axes, content)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8.5)
    return _png(figure)


def sizes(content: dict[str, Any]) -> bytes | None:
    """Draw the test metric against the number of images in the transfer set.

    Returns:
        A PNG, or None if no method was run with several sizes.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for method in content["ways"]:
        if method["images"] and method.get("share", 1.0) == 1.0:
            groups.setdefault(method["family"], []).append(method)
    several = {name: group for name, group in groups.items() if len({w["images"] for w in group}) > 1}
    if not several:
        return None
    look = styles(content["ways"])
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_xscale("log")
    for name, group in several.items():
        line = sorted(group, key=lambda w: w["images"])
        colour, marker, _ = look[name]
        x, y = [w["images"] for w in line], [w["accuracy"] for w in line]
        low = [max(0.0, w["accuracy"] - w["low"]) for w in line]
        high = [max(0.0, w["high"] - w["accuracy"]) for w in line]
        axes.errorbar(x, y, yerr=[low, high], fmt=f"{marker}-", color=colour, markersize=7, capsize=3, label=name)
    counts = [w["images"] for group in several.values() for w in group]
    _log_axis(axes, min(counts), max(counts), FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("images in the transfer set (logarithmic)")
    _finish(axes, content)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    return _png(figure)


def shares(content: dict[str, Any]) -> bytes:
    """Draw stacked bars of each method's FLOPs by stage, the teacher's stages in warm colours; returns a PNG."""
    methods = content["ways"]
    figure = Figure(figsize=(9.6, 0.3 * len(methods) + 1.4), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    names = [w["name"] for w in methods]
    left = [0.0] * len(methods)
    for stage in STAGES:
        widths = [w["stages"].get(stage, 0.0) for w in methods]
        if any(widths):
            axes.barh(names, widths, left=left, color=SHADES[stage], label=stage, height=0.72)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(EngFormatter(unit="FLOP"))
    axes.set_xlabel("compute by stage")
    axes.grid(True, axis="x", color=FAINT)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    return _png(figure)


def _point(axes: Axes, method: dict[str, Any], look: tuple[str, str, bool]) -> Line2D:
    """Draw a method; returns its entry of the legend."""
    colour, marker, filled = look
    low, high = method["accuracy"] - method["low"], method["high"] - method["accuracy"]
    bars = axes.errorbar(
        method["flops"],
        method["accuracy"],
        yerr=[[max(0.0, low)], [max(0.0, high)]],
        fmt=marker,
        color=colour,
        markerfacecolor=colour if filled else "white",
        markersize=7,
        elinewidth=1,
        capsize=2.5,
    )
    bars[0].set_label(f"{method['name']}  {method['accuracy']:.1%}")
    return bars[0]


def _log_axis(axes: Axes, low: float, high: float, formatter: Any) -> None:
    """Set limits with a margin, and few enough ticks to be readable if the points span a factor of 2 or of 10^5."""
    axes.set_xlim(low / 1.6, high * 1.6)
    decades = math.log10(high / low) if high > low else 0.0
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 0.5 else (1.0, 2.0, 5.0) if decades < 1.6 else (1.0, 3.0)
    axes.xaxis.set_major_locator(LogLocator(subs=subs if decades < 3 else (1.0,), numticks=9))
    axes.xaxis.set_major_formatter(formatter)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _finish(axes: Axes, content: dict[str, Any]) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel(f"test {metric_name(content)}")
    axes.grid(True, color=FAINT)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()
