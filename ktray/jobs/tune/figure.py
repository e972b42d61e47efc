"""The figures of a search: the Pareto set, parallel coordinates, and the importance of keys."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from ktray.jobs.compare.figure import FAINT, SOFT, _finish, _log_axis, _png
from ktray.reporting.units import flatten, flops, percent, seconds, usd
from ktray.tasks.base import metric_label

BASELINE_COLOUR, WINNER, FRONT, OTHER = "#d55e00", "#009e73", "#0072b2", "#9aa4ae"
SHOWN = {"flops": flops, "device_seconds": seconds, "usd": usd}
UNITS = {"flops": "compute", "device_seconds": "device time", "usd": "money"}
LONGEST = 44  # largest number of characters of a choice
MOST_AXES = 10  # largest number of parallel axes; the least important keys are omitted


def formatter(unit: str) -> EngFormatter:
    return EngFormatter(unit={"flops": "FLOP", "device_seconds": "s", "usd": "USD"}[unit])


def front(content: dict[str, Any]) -> bytes:
    """Draw validation against cost: all runs, the Pareto set, the baseline, and the winner; returns a PNG."""
    points = [p for trial in content["trials"] for p in trial["points"]]
    best = {p["run"] for p in content["front"]}
    figure = Figure(figsize=(9.0, 5.0), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_xscale("log")
    for trial in content["trials"]:  # the runs of one trial belong together
        x, y = [p["cost"] for p in trial["points"]], [p["validation"] for p in trial["points"]]
        axes.plot(x, y, color="#dfe3e8", linewidth=1, zorder=1)
    others = [p for p in points if p["run"] not in best]
    axes.scatter(
        [p["cost"] for p in others], [p["validation"] for p in others], s=26, color=OTHER, label="run of a trial"
    )
    line = content["front"]
    # The front is a step function, because nothing was measured between two runs.
    axes.plot(
        [p["cost"] for p in line],
        [p["validation"] for p in line],
        "o-",
        color=FRONT,
        drawstyle="steps-post",
        markersize=6,
        label="Pareto set",
    )
    baseline, winner = content["given"], content["winner"]
    axes.plot(
        baseline["cost"],
        baseline["validation"],
        "s",
        color=BASELINE_COLOUR,
        markersize=10,
        label="baseline",
        zorder=4,
    )
    axes.plot(
        winner["cost"],
        winner["validation"],
        "*",
        color=WINNER,
        markersize=17,
        markeredgecolor="white",
        label=f"winner: {winner['name']}",
        zorder=5,
    )
    costs = [p["cost"] for p in points if p["cost"] > 0]
    _log_axis(axes, min(costs), max(costs), formatter(content["cost"]))
    axes.set_xlabel(f"{UNITS[content['cost']]} of all stages that the model needs (logarithmic)")
    _finish(axes, content)
    axes.set_ylabel(f"validation {metric_label(content['metric'])}")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    return _png(figure)


def parallel(content: dict[str, Any]) -> bytes | None:
    """Draw parallel coordinates: one line for each trial through its choices, its cost and its validation metric.

    Returns:
        A PNG, or None if no trial has choices.
    """
    trials = [t for t in content["trials"] if t["points"] and t["params"]]
    keys = axes_of(content, trials)
    if not trials or not keys:
        return None
    last = [t["points"][-1] for t in trials]
    costs, values = np.array([p["cost"] for p in last]), np.array([p["validation"] for p in last])
    columns = [_column([t["params"].get(key) for t in trials]) for key in keys]
    columns.append((_scaled(np.log(costs)), _ends(costs, SHOWN[content["cost"]])))
    columns.append((_scaled(values), _ends(values, percent)))
    names = [*(key.replace(".", ".\n", 1) for key in keys), "cost", "validation"]
    figure = Figure(figsize=(max(7.0, 1.15 * len(names)), 4.6), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    where = list(range(len(names)))
    heights = np.column_stack([column for column, _ in columns])
    rng = np.random.default_rng(0)
    for row, colour, place in zip(heights, _colours(values), np.argsort(np.argsort(values)), strict=True):
        # Lines of equal choices would overlap; a little noise separates them.
        jitter = rng.normal(0, 0.008, len(row))
        axes.plot(where, row + jitter, color=colour, linewidth=1.1, alpha=0.85, zorder=2 + int(place))
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
    for at, (_, texts) in zip(where, columns, strict=True):
        axes.axvline(at, color="#b0b7bf", linewidth=1, zorder=1)
        for height, text in texts:
            axes.text(at + 0.04, height, text, fontsize=6.5, va="center", color="#1b1f24", zorder=200, bbox=box)
    axes.set_xticks(where, names, fontsize=7.5)
    axes.set_yticks([])
    axes.set_xlim(-0.15, len(names) - 0.4)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    return _png(figure)


def axes_of(content: dict[str, Any], trials: list[dict[str, Any]]) -> list[str]:
    """Return the most important keys that differ between the trials, in the order of the space."""
    keys = list(dict.fromkeys(key for t in trials for key in t["params"]))
    keys = [key for key in keys if len({str(t["params"].get(key)) for t in trials}) > 1]
    matters = sorted(keys, key=lambda key: -content["importance"].get(key, 0.0))[:MOST_AXES]
    return [key for key in keys if key in matters]


def importance(content: dict[str, Any]) -> bytes | None:
    """Draw bars with the share of the variance of validation that each key explains.

    Returns:
        A PNG, or None if the importances are unknown.
    """
    matters = content["importance"]
    if not matters:
        return None
    names = sorted(matters, key=lambda key: matters[key])
    figure = Figure(figsize=(7.2, 0.27 * len(names) + 0.9), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    transfer = ("transfer", "teach", "gallery")
    colours = [FRONT if name.split(".")[0] in transfer else OTHER for name in names]
    axes.barh(names, [matters[name] for name in names], color=colours, height=0.7)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("share of the variance of validation; blue: the transfer set", color=SOFT)
    axes.grid(True, axis="x", color=FAINT)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0, labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return _png(figure)


def _ends(values: np.ndarray, shown: Callable[[float | None], str]) -> list[tuple[float, str]]:
    return [(0.0, shown(float(values.min()))), (1.0, shown(float(values.max())))]


def _column(values: list[Any]) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Return the heights (0..1) of the values of one key, and the texts with the heights at which they are written."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len([v for v in values if v is not None]) and len(set(numbers)) > 4:
        low, high = min(numbers), max(numbers)
        log = low > 0 and high / low > 10
        scale = math.log if log else float
        span = scale(high) - scale(low)
        # If the key does not apply to a trial, the line of the trial passes below the axis.
        heights = [-0.12 if v is None else (scale(v) - scale(low)) / span for v in values]
        return np.array(heights), [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")]
    shown = labels([v for v in values if v is not None])
    names = sorted(shown, key=lambda name: (len(shown[name]), shown[name]))
    places = {name: i / max(1, len(names) - 1) for i, name in enumerate(names)}
    return (
        np.array([-0.12 if v is None else places[str(v)] for v in values]),
        [(height, shown[name]) for name, height in places.items()],
    )


def labels(choices: Sequence[Any]) -> dict[str, str]:
    """Return the label of each choice, by its text.

    If the choices set several keys (JSON objects, see `space.label`), a label contains the keys that differ between the
    choices, one on each line.
    """
    objects = {str(choice): _keys(choice) for choice in choices}
    if all(objects.values()):
        keys = {key for own in objects.values() for key in own}
        differ = {key for key in keys if len({json.dumps(own.get(key)) for own in objects.values()}) > 1}
        content = {text: _lines({k: own[k] for k in own if k in differ} or own) for text, own in objects.items()}
    else:
        content = {str(choice): f"{choice:.3g}" if isinstance(choice, float) else str(choice) for choice in choices}
    content = {choice: text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…" for choice, text in content.items()}
    if len(set(content.values())) < len(content):  # labels that are equal after the cut get a number
        content = {choice: f"{number} {text}" for number, (choice, text) in enumerate(content.items(), 1)}
    return content


def _keys(choice: Any) -> dict[str, Any]:
    """Return the dotted keys of a JSON object; no keys if the choice is not a JSON object."""
    try:
        content = json.loads(choice)
    except (TypeError, ValueError):
        return {}
    return flatten(content) if isinstance(content, dict) else {}


def _lines(keys: dict[str, Any]) -> str:
    """Write each value on a line: a name without its key, another value with its key."""
    return "\n".join(v if isinstance(v, str) else f"{k.rpartition('.')[2]} {v}" for k, v in keys.items())


def _scaled(values: np.ndarray) -> np.ndarray:
    span = float(values.max() - values.min())
    scaled: np.ndarray = (values - values.min()) / span if span else np.full(len(values), 0.5)
    return scaled


def _colours(values: np.ndarray) -> list[Any]:
    from matplotlib import colormaps

    order = np.argsort(np.argsort(values)) / max(1, len(values) - 1)
    return list(colormaps["viridis"](0.95 * (1 - order)))
