"""Plots of a run as inline SVG, which takes its colours from the style of the page.

Each of the colours below is replaced by a CSS variable of the page (``--ink``, ``--soft``, ``--line``, ``--series-1``
...), so the same plot works on light, dark and printed pages. Text stays text, which the browser draws, so class names
and labels in any script are legible.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

INK, _SOFT, _LINE = "#010101", "#010102", "#010103"
SERIES = ("#010201", "#010202", "#010203", "#010204", "#010205", "#010206")
_MARKERS = ("o", "s", "D", "^", "v", "P")
_VARIABLES = {
    INK: "var(--ink)",
    _SOFT: "var(--soft)",
    _LINE: "var(--line)",
    **{colour: f"var(--series-{i + 1})" for i, colour in enumerate(SERIES)},
}
# The same model has the same colour in every report.
_MAIN = {"student": 0, "scratch": 1, "teacher": 2}
VALIDATION_KEYS = ("val", "top1", "mean_class_accuracy", "miou", "accuracy")


@dataclass(frozen=True)
class CostPoint:
    """A model in the plot: the FLOPs of everything that led to it (0 where unknown), and its accuracy on test, a
    fraction."""

    name: str
    flops: float
    accuracy: float


def curves_svg(name: str, rows: Sequence[dict[str, Any]], identifier: str, metric: str = "accuracy") -> str:
    """Loss and validation accuracy by step, side by side. A panel without values is left out; the result is "" without
    any values.

    Args:
        name: name of the stage.
        rows: each with ``step`` and, where there are any, ``loss`` and a validation value (a key that starts
            with ``val``, or one of `VALIDATION_KEYS`), a fraction.
        identifier: distinguishes this plot's ids from those of others on the page.
        metric: name of the validation metric, for the label of its axis.
    """
    loss = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    score = [(row["step"], value) for row in rows if (value := validation_value(row)) is not None]
    panels = [(points, kind) for points, kind in ((loss, "loss"), (score, "score")) if points]
    if not panels:
        return ""
    figure = Figure(figsize=(4.3 * len(panels), 2.7), layout="constrained")
    for axes, (points, kind) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        series = 0 if kind == "loss" else 1
        marker = _MARKERS[series] if len(points) <= 25 else None
        axes.plot(*zip(*points, strict=True), color=SERIES[series], marker=marker, markersize=4, linewidth=1.8)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if kind == "loss":
            axes.set_ylabel("training loss")
        else:
            axes.set_ylabel(f"validation {metric}")
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=_decimals([y for _, y in points])))
            best = max(points, key=lambda point: point[1])
            axes.annotate(
                f"best {best[1]:.1%}",
                best,
                xytext=(0, 7),
                textcoords="offset points",
                ha="right" if best[0] > sum(axes.get_xlim()) / 2 else "left",
                color=INK,
            )
            axes.margins(y=0.18)
        style(axes)
    return svg(figure, identifier, f"Training curves of {name}")


def validation_value(row: dict[str, Any]) -> float | None:
    """The validation accuracy in a row of a curve; None if the row has none."""
    keys = [key for key in row if key.startswith("val")] + [key for key in VALIDATION_KEYS if key in row]
    value = next((row[key] for key in keys if isinstance(row[key], (int, float))), None)
    return None if value is None else float(value)


def cost_svg(points: Sequence[CostPoint], identifier: str, metric: str = "accuracy") -> str:
    """Accuracy against all FLOPs spent, on a logarithmic axis; "" where no point has a cost.

    A point without a cost (0), such as a downloaded teacher, becomes a horizontal line at its accuracy.
    """
    lines = [point for point in points if point.flops <= 0]
    points = [point for point in points if point.flops > 0]
    if not points:
        return ""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    others = iter(range(len(_MAIN), len(_MAIN) + len(points)))
    for point in points:
        series = (_MAIN[point.name] if point.name in _MAIN else next(others)) % len(SERIES)
        axes.plot(point.flops, point.accuracy, _MARKERS[series], color=SERIES[series], markersize=10, clip_on=False)
    low, high = min(p.flops for p in points), max(p.flops for p in points)
    axes.set_xlim(low / 3, high * 3)
    axes.set_ylim(*_span([p.accuracy for p in (*points, *lines)]))
    for line in lines:
        axes.axhline(line.accuracy, color=_SOFT, linewidth=1.4, linestyle=(0, (5, 4)))
        axes.annotate(
            f"{line.name} {line.accuracy:.1%}",
            (0.01, line.accuracy),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 4),
            textcoords="offset points",
            color=INK,
            parse_math=False,
        )
    for point in points:
        right_half = point.flops > (low * high) ** 0.5 and len(points) > 1
        axes.annotate(
            f"{point.name} {point.accuracy:.1%}",
            (point.flops, point.accuracy),
            xytext=(-10 if right_half else 10, 0),
            textcoords="offset points",
            ha="right" if right_half else "left",
            va="center",
            color=INK,
            parse_math=False,
        )
    axes.xaxis.set_major_locator(LogLocator(numticks=7))
    axes.xaxis.set_major_formatter(EngFormatter(unit="FLOP"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("cost of all stages, FLOP (logarithmic)")
    axes.set_ylabel(f"test {metric}")
    style(axes)
    return svg(figure, identifier, "Cost against accuracy")


def reliability_svg(bins: Sequence[dict[str, Any]], identifier: str) -> str:
    """Accuracy against confidence, with the diagonal of an honest model. The area of a point is its share of images.

    Args:
        bins: each with ``images``, ``confidence`` and ``accuracy``, fractions.
        identifier: distinguishes this plot's ids from those of others on the page.
    """
    figure = Figure(figsize=(3.8, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), color=_SOFT, linewidth=1.2, linestyle=(0, (5, 4)))
    confidence, accuracy = [row["confidence"] for row in bins], [row["accuracy"] for row in bins]
    axes.plot(confidence, accuracy, color=SERIES[0], linewidth=1.4)
    most = max(row["images"] for row in bins)
    axes.scatter(confidence, accuracy, s=[20 + 120 * row["images"] / most for row in bins], color=SERIES[0])
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("mean confidence of the images in a bin")
    axes.set_ylabel("their accuracy")
    style(axes)
    return svg(figure, identifier, "Reliability: accuracy against confidence")


def _span(values: Sequence[float]) -> tuple[float, float]:
    room = max(0.05, 0.25 * (max(values) - min(values)))
    return max(0.0, min(values) - room), min(1.02, max(values) + room)


def _decimals(values: Sequence[float]) -> int:
    return 0 if max(values) - min(values) > 0.04 else 1


def style(axes: Axes) -> None:
    """Grid, spines and colours of all plots."""
    axes.grid(True, color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    axes.tick_params(which="both", color=_LINE, labelcolor=_SOFT)
    axes.xaxis.label.set_color(_SOFT)
    axes.yaxis.label.set_color(_SOFT)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_LINE)


def svg(figure: Figure, identifier: str, label: str) -> str:
    """The figure as inline SVG with the colours of the page.

    Args:
        identifier: distinguishes the ids of this plot from those of others on the page.
        label: what the plot shows, for readers that do not see it.
    """
    figure.set_facecolor("none")
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": identifier}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{identifier}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    # The plot keeps its drawn size on wide pages and shrinks on narrow pages.
    width = f"{figure.get_figwidth() * 96:.0f}px"
    head = f'<svg role="img" aria-label="{html.escape(label)}" style="width:100%;max-width:{width};height:auto"'
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", head, 1)
