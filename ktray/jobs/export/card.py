"""The model card: the student's origin, its accuracy, size and speed, and its limits."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from ktray.data.labelled.labelled_set import LabelledSet
from ktray.jobs.export import licences
from ktray.jobs.export.agreement import PYTORCH
from ktray.jobs.export.targets.base import all_targets
from ktray.models.student.classifier import Student
from ktray.pipeline.finished_run import FinishedRun
from ktray.reporting import report, units

_SHOWN = 30
_WEAKEST = 3


def _files() -> dict[str, str]:
    """Return the file name of each model."""
    return {PYTORCH: "model.safetensors", **{name: target.file for name, target in all_targets()}}


def _sizes(content: dict[str, Any]) -> dict[str, int]:
    """Return the size in bytes of each model whose file exists."""
    files = content["files"]
    targets = {name: target.size(files) for name, target in all_targets() if target.file in files}
    return {PYTORCH: sum(f["bytes"] for name, f in files.items() if name.endswith(".safetensors")), **targets}


def write(folder: Path, source: FinishedRun, student: Student, task: LabelledSet, content: dict[str, Any]) -> None:
    """Write ``README.md``.

    Args:
        content: the content of ``export.json``.
    """
    r, recipe = source.result, source.recipe
    values = content["metric"]
    split = "test" if values["test"] else "val"
    per_class = {name: v for name, v in values[split]["pytorch"]["per_class"].items() if v is not None}
    weakest = sorted(per_class.items(), key=lambda item: item[1])[:_WEAKEST]
    counts = Counter(task.classes[c] for e in task.train for c in source.kind.classes_of(e.label))
    # Masks are not counted by class.
    least = min(counts, key=lambda n: counts[n], default="")
    most = max(counts, key=lambda n: counts[n], default="")
    per_class_budget = f"{counts[most]} a class" if counts[least] == counts[most] else ""
    maps = "maps" in student.served_facts()
    files = _files()
    names = {name: f"`{file}`" for name, file in files.items()} | {PYTORCH: "PyTorch (timm)"}
    title = f"{student.name} for {task_name(source)}"
    latency = content["latency"]
    cells = [(row["batch"], row["threads"]) for row in latency["models"]["pytorch"]["rows"]]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {
        "flops": units.flops,
        "seconds": units.seconds,
        "usd": units.usd,
        "percent": units.percent,
        "count": units.count,
        "size": units.size,
        "text": _text,
        "yaml": lambda text: json.dumps(text, ensure_ascii=False),
        "dropped": lambda counts: ", ".join(f"{n:,} {reason}" for reason, n in counts.items()),
    }
    template = environment.from_string(resources.files("ktray.jobs.export").joinpath("card.md").read_text("utf-8"))
    page = template.render(
        title=title,
        task=task_name(source),
        r=r,
        student=content["student"],
        classes=task.classes,
        classification=source.kind.image_classes,
        shown_classes=", ".join(task.classes[:_SHOWN]) + (", ..." if len(task.classes) > _SHOWN else ""),
        per_class_budget=(per_class_budget or f"{counts[least]} to {counts[most]} a class") if counts else "",
        maps=maps,
        pipeline="image-segmentation" if maps else "image-classification",
        teacher=r.get("teacher"),
        teacher_metric=r.get("teacher_metric"),
        teacher_licence=licences.of_teacher(recipe),
        student_licence=licences.of_student(recipe),
        transfer=r.get("transfer_set"),
        cost={"kwh": None, **r["cost"]},
        trained_on=_machine(r["device"]),
        metric_name=report.metric_label(r),
        val=values["val"]["pytorch"]["metric"],
        test=values["test"]["pytorch"]["metric"] if values["test"] else None,
        accuracy=[
            {
                "name": names[name],
                "val": values["val"][name]["metric"],
                "test": values["test"][name]["metric"] if values["test"] else None,
            }
            for name in values["val"]
        ],
        notes=content["notes"],
        calibration=content["calibration"],
        agreements=[
            {
                "file": target.file,
                "splits": content[name]["agreement"],
                "what": content[name].get("graph", "logits"),
            }
            for name, target in all_targets()
            if target.exact and (content.get(name) or {}).get("agreement")
        ],
        uses=[target.use for name, target in all_targets() if target.use and content.get(name)],
        per_class=sorted(per_class.items(), key=lambda item: task.classes.index(item[0])),
        per_class_name="IoU" if maps else report.metric_label(r) if source.kind.label_sets else "correct",
        per_class_split="test" if split == "test" else "validation",
        machine=_machine(content["device"]),
        measured_on=content["date"],
        busy=latency["busy_cores"],
        batch=latency["batch"],
        cells=cells,
        speeds=[
            {
                "name": names[name],
                "file": size,
                "memory": latency["models"].get(name, {}).get("memory_bytes"),
                "cells": _cells(latency["models"], name, cells),
            }
            for name, size in _sizes(content).items()
        ],
        weakest=", ".join(f"{name} ({units.percent(value)})" for name, value in weakest),
        unequal=f"{counts[least]:,} images of {least}, {counts[most]:,} of {most}"
        if counts and counts[most] >= 2 * counts[least]
        else "",
    )
    (folder / "README.md").write_text(page.strip() + "\n", encoding="utf-8")


def _cells(models: dict[str, Any], name: str, cells: list[tuple[int, int]]) -> list[dict[str, Any] | None]:
    """Return the measured row of a model for each (batch, threads); None: not measured."""
    rows = {(row["batch"], row["threads"]): row for row in models.get(name, {}).get("rows", [])}
    return [rows.get(cell) for cell in cells]


def task_name(source: FinishedRun) -> str:
    """Return the name of the task without its parent folders, which do not belong into a published card."""
    recipe = source.recipe
    data = recipe.task.data
    return Path(data.rstrip("/")).stem if data else str(recipe.task.name)


def closing(content: dict[str, Any]) -> str:
    """Return the closing table of an export for the terminal."""
    models, files, sizes = content["latency"]["models"], _files(), _sizes(content)
    cells = [(row["batch"], row["threads"]) for row in models["pytorch"]["rows"]]
    heads = [f"{n} image{'s' if n > 1 else ''}, {t} thread{'s' if t > 1 else ''}" for n, t in cells]
    rows = [["model", "file", "validation", "test", *heads]]
    for name in sorted(sizes, key=lambda name: (name not in models, list(models).index(name) if name in models else 0)):
        values = [(content["metric"][split] or {}).get(name, {}).get("metric") for split in ("val", "test")]
        times = [f"{row['median_ms']:.2f} ms" if row else "-" for row in _cells(models, name, cells)]
        rows.append([files[name], units.size(sizes[name]), *map(units.percent, values), *times])
    return units.aligned(rows, words=1, rules=(1,))


def _machine(device: dict[str, Any]) -> str:
    gpus = Counter(gpu["name"] for gpu in device.get("gpus") or [])
    parts = [f"{device.get('cpu')}, {device.get('cores')} cores", *(f"{n} x {name}" for name, n in gpus.items())]
    return ", ".join(parts)


def _text(text: str) -> str:
    """Escape a name from a user, so that it cannot become markup or end a table's cell."""
    escaped = "".join(f"\\{c}" if c in "\\`*_[]<>|#~" else c for c in str(text))
    return " ".join(escaped.split())
