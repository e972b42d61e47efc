"""The report of a run: the final table on the terminal, and ``report.html``, a page that needs no network.

Both read ``result.json`` (schema 1) and show the parts that it has; a job that trains no student has no accuracy
section.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.parquet as pq
from markupsafe import Markup
from PIL import Image

from ktray.reporting.hygiene import HygieneReport, clauses, closing_line
from ktray.reporting.plots import CostPoint, cost_svg, curves_svg, reliability_svg
from ktray.reporting.transfer_set import on_task_html
from ktray.reporting.units import aligned, count, flatten, flops, percent, seconds, size, usd
from ktray.reporting.worst import WorstError

# With more classes than the first number a matrix is illegible; with more than the second, its counts are.
_MATRIX_CLASSES, _NUMBERED_CLASSES = 50, 26
_PAIRS = 12
_LISTED = 20
_FAR = 0.15  # difference of student and teacher on validation from which the closing lines say what to change
_PICTURE_PIXELS = 192
# For results of versions that did not write the words.
_METRICS = {"top1": "top-1 accuracy", "mean_class_accuracy": "mean class accuracy", "miou": "mean IoU"}


def write_report(
    run_dir: Path,
    result: dict[str, Any],
    *,
    curves: Mapping[str, Sequence[dict[str, Any]]],
    confusion: np.ndarray | None,
    classes: Sequence[str],
    contact_sheet: Path | None,
    worst: Sequence[WorstError],
    worst_title: str = "",
    worst_value: str = "",
    comparisons: Sequence[dict[str, Any]] = (),
    hygiene: HygieneReport | None = None,
) -> Path:
    """Write ``report.html`` into the run folder. The page contains its images and styles and loads nothing.

    Args:
        run_dir: the run folder; its ``recipe.yaml``, if it exists, is shown.
        result: the content of ``result.json``.
        curves: by training stage, rows as `ktray.reporting.plots.curves_svg` takes them.
        confusion: (C, C) counts on test, rows are true classes.
        classes: C names.
        contact_sheet: PNG of the curate stage.
        worst: errors, worst first.
        worst_title: a sentence above the errors; "": the default, which says that they are the most confident errors.
        worst_value: name of their ``confidence``; "": it is the student's confidence.
        comparisons: further rows for the accuracy table and the cost plot, each with ``name`` and, where known,
            ``val``, ``test`` (fractions) and ``flops``. A row with the name of a model of the result replaces its row.
        hygiene: problems with the labelled images; None if they were not checked.

    Returns:
        The page's path.
    """
    metric = metric_label(result)
    rows = accuracy_rows(result, comparisons)
    points = [CostPoint(r["name"], r["flops"] or 0, r["test"]) for r in rows if r["test"] is not None]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters |= {
        "flops": flops,
        "seconds": seconds,
        "usd": usd,
        "percent": percent,
        "count": count,
        "size": size,
    }
    template = environment.from_string(resources.files("ktray.reporting").joinpath("report.html").read_text("utf-8"))
    recipe = run_dir / "recipe.yaml"
    page = template.render(
        r=result,
        metric=metric,
        worst_title=worst_title,
        worst_value=worst_value,
        cost=result.get("cost") or {},
        tiles=_tiles(result, rows, metric),
        advice=advice(result),
        stages=result.get("stages") or [],
        total=_total(result),
        accuracy=rows,
        curves=[
            (name, Markup(svg))
            for i, (name, points_) in enumerate(curves.items())
            if (svg := curves_svg(name, points_, f"curve{i}", metric))
        ],
        calibration=result.get("calibration"),
        reliability=Markup(reliability_svg(result["calibration"]["bins"], "reliability"))
        if result.get("calibration")
        else "",
        cost_plot=Markup(cost_svg(points, "cost", metric)),
        matrix=_matrix(confusion, classes),
        pairs=_confused(confusion, classes),
        table=class_table(result),
        classes=list(classes),
        sheet=_data_uri(contact_sheet.read_bytes()) if contact_sheet and contact_sheet.exists() else None,
        worst=[(w, *_picture(w.image)) for w in worst],
        hygiene=_hygiene(result, hygiene),
        data=_data(run_dir, result.get("data") or {}),
        transfer=result.get("transfer_set") or {},
        on_task=on_task_html((result.get("transfer_set") or {}).get("on_task")),
        facts=[(k, _texts(result.get(k))) for k in ("versions", "device", "mlflow") if result.get(k)],
        recipe=recipe.read_text("utf-8") if recipe.exists() else "",
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def closing_table(result: dict[str, Any]) -> str:
    """The stages with their costs, and the accuracies, as text for a terminal."""
    rows = [["stage", "cached", "time", "compute", "money"]]
    for stage in result.get("stages") or []:
        cached = "yes" if stage.get("cached") else "no"
        if stage.get("attempts", 1) > 1:
            cached += f" ({stage['attempts']} attempts)"
        rows.append(
            [
                stage["name"],
                cached,
                seconds(stage.get("wall_seconds")),
                flops(stage.get("flops")),
                usd(stage.get("usd")),
            ]
        )
    total = _total(result)
    rows.append(["total", "", seconds(total["wall_seconds"]), flops(total["flops"]), usd(total["usd"])])
    last = len(rows) - 1
    cost = result.get("cost") or {}
    outside = [row for row in result.get("stages") or [] if row["name"] in (cost.get("baselines") or {})]
    if any(not row.get("cached") for row in outside):
        everything = cost.get("with_baselines") or {}
        wall = (total["wall_seconds"] or 0.0) + sum(row.get("wall_seconds") or 0.0 for row in outside)
        names = " and ".join(dict.fromkeys(row["name"] for row in outside))
        rows.append([f"with {names}", "", seconds(wall), flops(everything.get("flops")), usd(everything.get("usd"))])
    text = aligned(rows, words=2, rules=(1, last))
    accuracy = accuracy_rows(result)
    if accuracy:
        table = [[metric_label(result), "validation", "test"]]
        table += [[row["name"], percent(row["val"]), percent(row["test"])] for row in accuracy]
        text += "\n\n" + aligned(table, words=1, rules=(1,))
    if (result.get("metric") or {}).get("test_images") == 0:
        text += (
            "\n\nno test split: there is no test metric. The student was chosen on validation, so that its accuracy "
            "there is an optimistic estimate."
        )
    for line in filter(None, [_unusable(result), *advice(result), closing_line(result), planned_line(result)]):
        text += f"\n\n{line}"
    return text


def _unusable(result: Mapping[str, Any]) -> str:
    """How many images could not be used, and where they are listed; empty if all could."""
    data = result.get("data") or {}
    number = data.get("quarantined") or 0
    if not number:
        return ""
    reasons = ", ".join(f"{reason} ({times:,})" for reason, times in Counter(data.get("reasons") or {}).most_common(3))
    listed = data.get("quarantine_list")
    text = f"images that could not be used: {number:,}" + (f", such as {reasons}" if reasons else "")
    return f"{text}. The report lists them" + (f", and so does {listed}." if listed else ".")


def planned_line(result: Mapping[str, Any]) -> str:
    """What was planned for the stages that the run computed, and what they took; empty if none is comparable."""
    plan = result.get("plan") or {}
    if not plan.get("stages"):
        return ""
    return (
        f"planned {seconds(plan['planned_seconds'])}, {usd(plan['planned_usd'])}; took {seconds(plan['seconds'])}, "
        f"{usd(plan['usd'])} ({', '.join(row['name'] for row in plan['stages'])})."
    )


def advice(result: dict[str, Any]) -> list[str]:
    """Which student the run delivers and why, and advice if it is a baseline. The test split is not used."""
    delivered = result.get("delivered")
    if not delivered or len(delivered["validation"]) < 2:
        return []
    others = {name: val for name, val in delivered["validation"].items() if name != delivered["name"]}
    text = f"delivered: {delivered['what']}. It is the best on validation: " + ", ".join(
        f"{name} {percent(val)}" for name, val in {delivered["name"]: result["metric"]["val"], **others}.items()
    )
    lines = [text + "."]
    teacher, best = (result.get("teacher_metric") or {}).get("val"), result["metric"]["val"]
    if teacher is not None and best is not None and teacher - best > _FAR:
        lines.append(
            f"note: the student is {100 * (teacher - best):.0f} points below its teacher on validation. More "
            "train.steps, a larger image_size, a larger transfer set or another student.name can bring it nearer."
        )
    distilled = max((val for name, val in others.items() if f"{name}_metric" not in result), default=None)
    if f"{delivered['name']}_metric" in result and distilled is not None:
        why = (
            " The teacher is less accurate than this student, so that there is nothing to transfer."
            if teacher is not None and teacher < best
            else ""
        )
        lines.append(
            f"note: the distilled student ({percent(distilled)} on validation) loses to a baseline ({percent(best)}) "
            f"and is not delivered.{why} Try another teacher.name, teacher.adapt=finetune, or more train.steps."
        )
    return lines


def accuracy_rows(result: dict[str, Any], comparisons: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """``name``, ``val``, ``test``, ``flops`` of teacher, baselines, comparisons and student; None where unknown.

    The FLOPs are those of everything that led to the model, including stages that this run reused from the store.
    """
    cost = result.get("cost") or {}
    baselines = cost.get("baselines") or {}
    student = (cost.get("without_cache") or {}).get("flops") or (cost.get("flops") or {}).get("total")
    models = [
        ("teacher", result.get("teacher_metric"), None),
        ("scratch", result.get("scratch_metric"), (baselines.get("scratch") or {}).get("flops")),
        ("start", result.get("start_metric"), (baselines.get("start") or {}).get("flops")),
        ("distilled", result.get("distilled_metric"), student),
        ("student", result.get("metric"), student),
    ]
    rows = {
        name: {"name": name, "val": m.get("val"), "test": m.get("test"), "flops": m.get("flops", spent)}
        for name, m, spent in models
        if m
    }
    last = rows.pop("student", None)
    for row in comparisons:
        rows[row["name"]] = {"name": row["name"], **{k: row.get(k) for k in ("val", "test", "flops")}}
    if last:
        rows.setdefault("student", last)
    return list(rows.values())


def metric_label(result: dict[str, Any]) -> str:
    """The name of the metric of a result, in words."""
    metric = result.get("metric") or {}
    name = metric.get("name") or "top1"
    return str(metric.get("words") or _METRICS.get(name, name))


def _total(result: dict[str, Any]) -> dict[str, Any]:
    cost = result.get("cost") or {}
    return {
        "wall_seconds": cost.get("wall_seconds"),
        "flops": (cost.get("flops") or {}).get("total"),
        "device_seconds": (cost.get("device_seconds") or {}).get("total"),
        "usd": cost.get("usd"),
    }


def _tiles(result: dict[str, Any], rows: Sequence[dict[str, Any]], metric: str) -> list[tuple[str, str, str]]:
    """(label, value, note) of the most important numbers."""
    tests = {row["name"]: row["test"] for row in rows if row["test"] is not None}
    tiles = []
    if "student" in tests:
        notes = [
            f"{100 * (tests['student'] - tests[other]):+.1f} points compared with {other}".replace("-", "−")
            for other in ("start", "scratch", "teacher")
            if other in tests
        ]
        tiles.append((f"student, test {metric}", percent(tests["student"]), " · ".join(notes)))
    total, worth = _total(result), (result.get("cost") or {}).get("without_cache") or {}
    for label, key, show in (("compute spent", "flops", flops), ("money spent", "usd", usd)):
        if total[key] is not None:
            spent, alone = show(total[key]), show(worth.get(key))
            tiles.append((label, spent, f"{alone} without reuse" if alone not in ("–", spent) else ""))
    if total["wall_seconds"] is not None:
        device = total["device_seconds"]
        note = f"{seconds(device)} of device time" if device is not None else ""
        tiles.append(("time in stages", seconds(total["wall_seconds"]), note))
    return tiles


def _matrix(confusion: np.ndarray | None, classes: Sequence[str]) -> dict[str, Any] | None:
    """Cells as (count, share of the row 0..1, which sets the shade); None with too many classes for a legible
    matrix."""
    if confusion is None or not 0 < len(classes) <= _MATRIX_CLASSES:
        return None
    share = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    rows = [
        (name, [(int(n), round(float(s), 3)) for n, s in zip(counts, shares, strict=True)])
        for name, counts, shares in zip(classes, confusion, share, strict=True)
    ]
    return {"rows": rows, "numbered": len(classes) <= _NUMBERED_CLASSES}


def _confused(confusion: np.ndarray | None, classes: Sequence[str]) -> list[tuple[str, str, int, float]]:
    """(true, predicted, count, share of the true class) of the pairs that are confused most often."""
    if confusion is None:
        return []
    wrong = np.array(confusion)
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[: _PAIRS if len(classes) <= _MATRIX_CLASSES else 3 * _PAIRS]
    pairs = [(*np.unravel_index(i, wrong.shape), int(wrong.flat[i])) for i in order.tolist() if wrong.flat[i]]
    return [(classes[t], classes[p], n, n / int(confusion[t].sum())) for t, p, n in pairs]


def class_table(result: dict[str, Any]) -> dict[str, Any] | None:
    """``heads`` and ``rows`` (name, cells) of the figures by class, lowest metric first; None without further figures
    than the metric. Numbers of images are shown as such, all other figures as percentages."""
    metric = result.get("metric") or {}
    details = metric.get("details") or {}
    if not details:
        return None
    columns: dict[str, dict[str, Any]] = {metric_label(result): metric.get("per_class") or {}}
    for name in next(iter(details.values())):
        columns[name] = {c: figures[name] for c, figures in details.items()}
    columns |= {name.removesuffix("s"): values for name, values in (metric.get("decisions") or {}).items()}
    first = next(iter(columns.values()))
    order = sorted(details, key=lambda c: (first.get(c) is not None, first.get(c) or 0.0))
    cells = [
        [
            count(by_name.get(c)) if isinstance(by_name.get(c), int) else percent(by_name.get(c))
            for by_name in columns.values()
        ]
        for c in order
    ]
    return {"heads": list(columns), "rows": list(zip(order, cells, strict=True))}


def _hygiene(result: dict[str, Any], shown: HygieneReport | None) -> dict[str, Any] | None:
    numbers = result.get("hygiene")
    if not numbers or shown is None:
        return None
    groups = [(title, [([_picture(i) for i in e.images], e) for e in exhibits]) for title, exhibits in shown.groups]
    return {**numbers, "clauses": clauses(numbers), "groups": groups, "torn": list(shown.torn)}


def _data(run_dir: Path, data: dict[str, Any]) -> dict[str, Any]:
    rows = _quarantined(run_dir, data.get("quarantine_list"))
    reasons = Counter(reason for _, reason in rows)
    return {**data, "reasons": reasons.most_common(), "rows": rows[:_LISTED], "more": max(0, len(rows) - _LISTED)}


def _quarantined(run_dir: Path, listed: str | None) -> list[tuple[str, str]]:
    """(uri, reason) of a quarantine list on this machine; empty if the list is elsewhere."""
    path = run_dir / (listed or "")
    if not listed or not path.is_file():
        return []
    rows = pq.read_table(path).to_pylist() if path.suffix == ".parquet" else json.loads(path.read_text("utf-8"))
    return [(str(row["uri"]), str(row["reason"])) for row in rows]


def _picture(image: np.ndarray) -> tuple[str, bool]:
    """A data URI, and whether the image is so small that its pixels should be visible."""
    picture = Image.fromarray(image)
    picture.thumbnail((_PICTURE_PIXELS, _PICTURE_PIXELS))
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return _data_uri(out.getvalue()), max(picture.size) < 100


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _texts(value: Any) -> list[tuple[str, str]]:
    return [(name, "–" if leaf is None else str(leaf)) for name, leaf in flatten(value).items()]
