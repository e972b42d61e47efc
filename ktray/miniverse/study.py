"""Content and value of transfer sets: a chart from a comparison on the miniverse.

    python -m ktray.miniverse.study STORE/runs/COMPARISON CHART.png

The subject of each gallery image of the miniverse is known, because captions always name it. Therefore the share of a
transfer set that is on task (shows a subject of the task's kinds) can be compared with the accuracy of the students.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from ktray.data.sources.listing import list_shards
from ktray.data.sources.shards import read_shard
from ktray.data.sources.uris import ImageRef
from ktray.miniverse.tasks import TASKS
from ktray.miniverse.vocabulary import SUBJECTS
from ktray.recipe.choice import DEFAULT_STRATEGY

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6a00", "#56b4e9", "#4a5560")
MARKERS = "osD^vPX"


@dataclass(frozen=True)
class StudyPoint:
    """One method of a comparison: how its transfer set was chosen, and its results (fractions)."""

    group: str
    images: int
    on_task: float
    accuracy: float
    spread: float


def on_task(uris: Sequence[str], captions: Mapping[str, str], names: Sequence[str]) -> float:
    """Share of the images whose caption names one of the task's subjects.

    Args:
        uris: the images.
        captions: captions by uri of the whole image.
        names: noun phrases of the subjects, such as "capital letter K".
    """
    # The phrase is followed by " in COLOUR", " on a ..." or nothing: "capital letter I" must not match "... In".
    phrases = {f"the {name}" for name in names}
    mentioned = (captions[str(ImageRef.parse(uri).whole)].partition(" in ")[0].partition(" on a ")[0] for uri in uris)
    return sum(caption in phrases for caption in mentioned) / max(1, len(uris))


def read_captions(gallery: str | list[str]) -> dict[str, str]:
    """Captions of a gallery by uri."""
    return {r.uri: r.caption or "" for shard in list_shards(gallery) for r in read_shard(shard)}


def points(comparison: dict[str, Any], store: Path, captions: Mapping[str, str]) -> list[StudyPoint]:
    """A point for each method in a ``result.json`` of a comparison; methods that differ only in size share a group."""
    task = TASKS[str(comparison["task"])]
    names = [subject.name for kind in task.kinds for subject in SUBJECTS[kind]]
    study_points = []
    for method in comparison["ways"]:
        keys = {key: value for key, value in method["keys"].items() if key != "transfer.size"}
        drawn = keys.get("transfer.source") == "generic"
        group = "random" if drawn else str(keys.get("transfer.strategy", DEFAULT_STRATEGY))
        run = json.loads((store / "runs" / method["runs"][0] / "result.json").read_text())
        uris = pq.read_table(run["transfer_set"]["path"], columns=["uri"])["uri"].to_pylist()
        share = on_task(uris, captions, names)
        study_points.append(StudyPoint(group, len(uris), share, method["accuracy"], method["spread"] or 0.0))
    return study_points


def draw(study_points: Sequence[StudyPoint], title: str) -> Figure:
    """Share on task and accuracy by size of the transfer set, with one line for each strategy."""
    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    groups = list(dict.fromkeys(p.group for p in study_points))
    for place, (group, colour, marker) in enumerate(zip(groups, COLOURS, MARKERS, strict=False)):
        line = sorted((p for p in study_points if p.group == group), key=lambda p: p.images)
        # Sizes are shifted slightly, so that the error bars of different strategies do not overlap.
        sizes = [p.images * 2 ** (0.09 * (place - (len(groups) - 1) / 2)) for p in line]
        look = {"color": colour, "marker": marker, "markersize": 6, "linewidth": 1.6}
        left.plot(sizes, [p.on_task for p in line], label=group, **look)
        right.errorbar(sizes, [p.accuracy for p in line], [p.spread for p in line], capsize=3, **look)
    left.set_title("share of the transfer set that is on task", fontsize=11, loc="left")
    right.set_title("student's test accuracy (mean and s.d.)", fontsize=11, loc="left")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        ticks = sorted({2 ** round(math.log2(p.images / 250)) * 250 for p in study_points})
        axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("images in the transfer set (logarithmic)")
        axes.grid(color="#e3e6ea", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def main(arguments: Sequence[str]) -> None:
    """Read the folder of a comparison, write the chart and print the table."""
    folder, chart = Path(arguments[0]), Path(arguments[1])
    comparison = json.loads((folder / "result.json").read_text())
    store = folder.parents[1]
    gallery = next(store.glob("**/miniverse-*-gallery-*"))
    study_points = points(comparison, store, read_captions(str(gallery)))
    seeds = len(comparison["seeds"])
    figure = draw(
        study_points, f"Transfer sets for {comparison['task']}, {comparison['student']}, {seeds} seeds, equal steps"
    )
    FigureCanvasAgg(figure).print_png(str(chart))
    print("| strategy | images | on task | test accuracy |\n|---|---|---|---|")
    for p in study_points:
        print(f"| {p.group} | {p.images:,} | {p.on_task:.1%} | {p.accuracy:.1%} ± {100 * p.spread:.1f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
