"""Write the results of a run: result.json, the student and the report, into the run folder and to MLflow."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ktray.accounting.device import versions
from ktray.models.student.classifier import Student
from ktray.pipeline import results_hygiene
from ktray.pipeline.select import BASELINES, DISTILLED, MODELS
from ktray.recipe.schema import Recipe
from ktray.reporting.report import write_report
from ktray.reporting.result import SCHEMA, DistillResult, TrialResult, finished, write_result
from ktray.stages.base import RunContext
from ktray.stages.evaluate import stage as evaluate
from ktray.stages.hygiene import LIST
from ktray.stages.manifests import AdaptManifest, CurateManifest, EvaluateManifest
from ktray.stages.transfer import starting_at, student_spec
from ktray.storage.store import Dir
from ktray.tasks.base import TestSet
from ktray.tracking.metrics import stable_metrics
from ktray.training.worker import WorkerContext

if TYPE_CHECKING:
    from ktray.pipeline.graph import StageOutputs


def write(
    context: RunContext, outputs: StageOutputs, begun: float, plan: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write the run folder and log it; returns the content of ``result.json``.

    Args:
        plan: what was planned, and what it took (`ktray.pipeline.estimate.compared`).
    """
    folder = context.store.run(context.run_id)
    typed = build(context, outputs, folder, begun, trial=False, plan=plan)
    result = typed.content()
    with tempfile.TemporaryDirectory(prefix="ktray-") as scratch:
        local = Path(scratch)
        student, example = _student(context, outputs, local / "student")
        folder.put(local / "student", "student")
        context.runtime.quarantine.write(str(local / "quarantine.parquet"))
        folder.put(local / "quarantine.parquet")
        report = _report(context, outputs, result, local)
        folder.put(report)
    write_result(folder, typed)
    _log(context, outputs, result, folder, student, example)
    folder.delete("running.json")
    return result


def write_trial(context: RunContext, outputs: StageOutputs, begun: float) -> dict[str, Any]:
    """Write and log the result of a trial: ``result.json`` with the metrics on validation and the cost."""
    folder = context.store.run(context.run_id)
    result = write_result(folder, build(context, outputs, folder, begun, trial=True))
    context.tracker.final(stable_metrics(result))
    folder.delete("running.json")
    return result


def build(
    context: RunContext,
    outputs: StageOutputs,
    folder: Dir,
    begun: float,
    trial: bool,
    plan: dict[str, Any] | None = None,
) -> DistillResult | TrialResult:
    """The content of ``result.json``. That of a trial has nothing from the test split."""
    recipe = context.recipe
    metrics = outputs.evaluate.manifest["metrics"] if outputs.evaluate else {}
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "run_id": context.run_id,
        "folder": folder.uri,
        "task": recipe.task.name or recipe.task.data,
        "objective": recipe.objective.name,
        "student": recipe.student.name,
        "start": student_spec(context).initial,
        "teacher": recipe.teacher.name if outputs.adapt else None,
        "seed": recipe.seed,
        "label_budget": len(context.task.train),
        "metric": {
            "name": context.metric,
            "words": context.kind.metrics[context.metric],
            "val": outputs.student.val,
        },
        "delivered": _delivered(outputs),
        "cost": context.ledger.summary(),
        "stages": context.ledger.stages(),
        "data": {
            "read": context.runtime.read,
            "quarantined": context.runtime.quarantine.images(),
            "reasons": dict(Counter(bad.reason for bad in context.runtime.quarantine)),
            "quarantine_list": folder.file("quarantine.parquet"),
        },
        "mlflow": context.tracker.info(),
        "versions": versions(),
        "device": dict(context.ledger.device),
        "cluster": {
            "workers": recipe.cluster.workers,
            "cpus": context.plan.total_cpus,
            "gpus": context.plan.total_gpus,
            "machines": context.runtime.machines.types() if context.runtime.machines else [],
        },
        **finished(begun),
        "wall_seconds": round(time.time() - begun, 2),
    }
    if metrics:
        student = metrics["student"]
        content["metric"] |= {
            "test": student[context.metric],
            **{k: v for k, v in student.items() if k not in ("per_class", "details", "n")},
            "per_class": student["per_class"],
            "test_images": student["n"],
        }
        if "details" in student:
            content["metric"]["details"] = student["details"]
        assert outputs.evaluate is not None  # it has the metrics
        honesty = context.kind.calibration(evaluate.load(outputs.evaluate.stage, reduce=context.kind.compact))
        if honesty is not None:
            content["calibration"] = honesty
    elif not trial:
        content["metric"] |= {"test": None, "per_class": {}, "test_images": 0}
    if decisions := _decisions(outputs):
        content["metric"]["decisions"] = decisions
    tested = {who: {"test": metrics[who][context.metric]} for who in metrics}
    if outputs.adapt and outputs.teacher:
        adapted, facts = cast(AdaptManifest, outputs.adapt.manifest), outputs.teacher.manifest
        members = {"members": facts["members"]} if "members" in facts else {}
        content["teacher_metric"] = {
            "val": facts["val"],
            "adapt": adapted["chosen"],
            **members,
            **tested.get("teacher", {}),
        }
    for candidate in outputs.candidates if recipe.objective.has_transfer_set() else []:
        if candidate.name in BASELINES:
            name = evaluate.STUDENT if candidate is outputs.student else candidate.name
            content[f"{candidate.name}_metric"] = {"val": candidate.val, **tested.get(name, {})}
    if DISTILLED in metrics:
        content["distilled_metric"] = {"val": outputs.candidates[0].val, **tested[DISTILLED]}
    if outputs.curate:
        content["transfer_set"] = transfer_set(recipe, outputs.curate.manifest, outputs.curate.stage)
    if plan:
        content["plan"] = plan
    if outputs.hygiene:
        content["hygiene"] = results_hygiene.numbers(outputs.hygiene)
    return TrialResult(**content) if trial else DistillResult(**content)


def transfer_set(recipe: Recipe, curated: Mapping[str, Any], folder: Dir) -> dict[str, Any]:
    """The entry of ``result.json`` for the transfer set.

    Args:
        curated: the manifest of CURATE.
        folder: the folder that holds the list of the images.
    """
    part, facts = recipe.transfer, cast(CurateManifest, curated)
    return {
        "source": part.source,
        "strategy": part.chosen_strategy.name,
        "size": part.size,
        "kept": facts["kept"],
        "dropped": facts["dropped"],
        "path": folder.file("transfer.parquet"),
        "on_task": facts.get("on_task"),
    }


def _delivered(outputs: StageOutputs) -> dict[str, Any]:
    """The entry of ``result.json`` for the choice of the student."""
    others = {c.name: c.val for c in outputs.candidates if c is not outputs.student}
    return {
        "name": outputs.student.name,
        "what": MODELS[outputs.student.name],
        "validation": {c.name: c.val for c in outputs.candidates},
        "margin": outputs.student.val - max(others.values()) if others else None,
    }


def _student(context: RunContext, outputs: StageOutputs, folder: Path) -> tuple[Any, Any]:
    student = _trained(context, outputs)
    context.kind.save_student(student, folder, context.task.classes)
    example = np.zeros((2, 3, *student.preprocess.size), np.float32)
    return student.model, example


def _trained(context: RunContext, outputs: StageOutputs) -> Student:
    """The student of the run, in evaluation mode on the CPU."""
    spec = starting_at(student_spec(context), outputs.student.trained)
    model, _ = spec.build(WorkerContext(torch.device("cpu"), 0, 1, 1.0), 0)
    student = spec.make(bare=True)
    student.model.load_state_dict(model.state_dict())
    if decisions := _decisions(outputs):
        student = context.kind.with_decisions(student, decisions)
    return student.eval()


def _decisions(outputs: StageOutputs) -> dict[str, dict[str, float]]:
    """What was fitted on validation for the decisions of the delivered student; empty if they need nothing."""
    tested = cast(EvaluateManifest, outputs.evaluate.manifest if outputs.evaluate else {})
    return tested.get("decisions", {}).get(evaluate.STUDENT, {})


def _report(context: RunContext, outputs: StageOutputs, result: dict[str, Any], folder: Path) -> Path:
    classes, kind = context.task.classes, context.kind
    worst, counts = [], None
    if outputs.evaluate is not None and context.task.test:
        rows = evaluate.load(outputs.evaluate.stage, reduce=kind.compact)
        reader = kind.reader(context.task, whole=True)
        pixels = context.recipe.data.max_pixels
        worst = kind.worst(TestSet(rows, context.task, reader, partial(_trained, context, outputs), pixels))
        counts = evaluate.confusion(context, outputs.evaluate.stage, rows)
    trained = {"transfer": outputs.transfer, "finetune": outputs.finetune}
    trained |= {c.name: c.trained for c in outputs.candidates if c.name in BASELINES}
    curves = {name: done.manifest["curve"] for name, done in trained.items() if done is not None}
    sheet = None
    if outputs.curate and outputs.curate.stage.exists("contact_sheet.png"):
        sheet = folder / "contact_sheet.png"
        sheet.write_bytes(outputs.curate.stage.read("contact_sheet.png"))
    return write_report(
        folder,
        {**result, "recipe": context.store.run(context.run_id).read("recipe.yaml").decode()},
        curves=curves,
        confusion=counts,
        classes=classes,
        contact_sheet=sheet,
        worst=worst,
        worst_title=kind.worst_title,
        worst_value=kind.worst_value,
        hygiene=results_hygiene.report(outputs.hygiene, context.recipe.data.max_pixels) if outputs.hygiene else None,
    )


def _log(
    context: RunContext, outputs: StageOutputs, result: dict[str, Any], folder: Dir, student: Any, example: Any
) -> None:
    tracker = context.tracker
    tracker.final(stable_metrics(result))
    for name in ("report.html", "result.json", "recipe.yaml", "quarantine.parquet"):
        tracker.stored(folder, name)
    tracker.stored(folder, "student", "student_files")
    if outputs.curate:
        for name in ("contact_sheet.png", "transfer.parquet"):
            if outputs.curate.stage.exists(name):
                tracker.stored(outputs.curate.stage, name)
    if outputs.hygiene:
        tracker.stored(outputs.hygiene.stage, LIST)
    tracker.log_student(student, example)
