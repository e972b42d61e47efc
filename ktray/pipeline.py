"""The seven stages in order, and what a run leaves behind."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ktray
from ktray import results
from ktray.device import describe_device
from ktray.ledger import Ledger, gpu_joules
from ktray.models.teacher import TeacherSource
from ktray.recipe import Recipe, digest, dump
from ktray.resolve import Resolved, resolve
from ktray.resources import Plan, cluster_plan, connect
from ktray.stages import adapt, curate, evaluate, finetune, index, labels, teach, transfer
from ktray.stages.base import Context, Done
from ktray.stages.teachers import TeacherSpec
from ktray.store import Dir, Store
from ktray.tracking import Tracker, catch_up

FLOOR = "scratch"


@dataclass
class Made:
    """The stages of one run; None where the recipe has no such stage."""

    labels: Done
    evaluate: Done
    student: Done
    adapt: Done | None = None
    index: Done | None = None
    curate: Done | None = None
    teach: Done | None = None
    transfer: Done | None = None
    floor: Done | None = None


def run(recipe: Recipe, say: Callable[[str], None], debug: bool = False) -> dict[str, Any]:
    """Run a recipe to its end; returns the content of ``result.json``.

    An unfinished run of the same recipe is continued under its id; a finished one is left alone and a new run
    reuses its stages.
    """
    begun = time.time()
    store = Store(recipe.store)
    store.check_writable()
    connect(debug)
    plan = cluster_plan(recipe.cluster.workers, recipe.cluster.use_gpu)
    say(plan.line)
    found = resolve(recipe, plan, say)
    for reason in found.reasons:
        say(f"recipe    {reason}")
    context = _open(store, found, plan, say)
    status = "FAILED"
    try:
        made = stages(context)
        result = results.write(context, made, begun)
        status = "FINISHED"
        return result
    finally:
        context.tracker.finish(status)
        pending = context.tracker.close(timeout=60)
        if pending:
            say(f"mlflow    {pending} events wait in log.jsonl; the next run sends them")
        else:
            home = local_home(store)
            catch_up(home / "runs", recipe.mlflow.uri, recipe.mlflow.experiment, home)


def whole_stages(store: Store, found: Resolved, plan: Plan) -> dict[str, bool]:
    """For a plan: by the name in the ledger, whether the store holds the stage whole. Runs and writes nothing."""
    device = describe_device()
    silent = cast(Tracker, None)  # no stage is run, so nothing is logged
    context = _context(store, found, plan, lambda text: None, Ledger(device), silent, "plan")
    context.planned = {}
    stages(context)
    return context.planned


def _open(store: Store, found: Resolved, plan: Plan, say: Callable[[str], None]) -> Context:
    recipe = found.recipe
    text = dump(recipe)
    same = digest(text, found.fingerprint)
    run_id, folder = _run_folder(store, recipe, same)
    folder.write("recipe.yaml", text.encode())
    local = local_home(store)
    tracker = Tracker(
        recipe.mlflow.uri,
        recipe.mlflow.experiment,
        local / "runs" / run_id / "log.jsonl",
        local / "runs" / run_id / "mlflow.json",
        local,
    )
    flat = {k: v for k, v in _flat(recipe.model_dump(mode="json")).items() if v is not None}
    tracker.start(
        run_id,
        params=flat,
        tags={"task": str(recipe.task.name or recipe.task.data), "objective": recipe.objective.name},
    )
    say(f"run       {folder.uri}")
    ledger = Ledger(describe_device(), run_id, recipe.prices, gpu_joules())
    return _context(store, found, plan, say, ledger, tracker, run_id)


def _context(
    store: Store,
    found: Resolved,
    plan: Plan,
    say: Callable[[str], None],
    ledger: Ledger,
    tracker: Tracker,
    run_id: str,
) -> Context:
    return Context(
        recipe=found.recipe,
        store=store,
        plan=plan,
        ledger=ledger,
        tracker=tracker,
        task=found.task,
        class_names=found.class_names,
        prompts=found.prompts,
        fingerprint=found.fingerprint,
        canvas=found.canvas,
        run_id=run_id,
        say=say,
    )


def local_home(store: Store) -> Path:
    """Local folder for the embedded MLflow and the logs: the store itself, or ``./ktray-store`` beside S3."""
    return Path(store.path) if store.is_local else Path("ktray-store").absolute()


def _run_folder(store: Store, recipe: Recipe, same: str) -> tuple[str, Dir]:
    runs = store.sub("runs")
    for name in reversed(runs.children()):
        folder = store.run(name)
        if folder.exists("running.json") and folder.read_json("running.json").get("recipe") == same:
            return name, folder
    task = recipe.task.name or Path(str(recipe.task.data)).stem
    safe = "".join(c if c.isalnum() else "-" for c in task)[:24]
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{safe}-{recipe.objective.name}-{uuid.uuid4().hex[:4]}"
    folder = store.run(run_id)
    folder.write_json("running.json", {"recipe": same, "ktray": ktray.__version__})
    return run_id, folder


def stages(context: Context) -> Made:
    """Run the stages, each reused where it is whole."""
    from ktray.models.student import build_student

    recipe = context.recipe
    part = recipe.student
    size, classes = recipe.image_size, len(context.task.classes)
    student = build_student(str(part.name), dict(part.kwargs), classes, size, part.pretrained, part.checkpoint)
    for warning in student.warnings:
        context.say(f"student   {warning}")
    if recipe.objective.name == "scratch":
        decoded = labels.run(context, student.preprocess)
        done = finetune.run_scratch(context, decoded, booked="finetune")
        models = {"student": (transfer.student_spec(context, done.stage), done.key)}
        return Made(decoded, evaluate.run(context, models, None), done)
    t = recipe.teacher
    spec = TeacherSpec.of(TeacherSource(str(t.name), t.checkpoint, t.config, t.image_size))
    adapted = adapt.run(context, spec, recipe.cluster.max_failures)
    indexed = index.run(context, spec) if recipe.transfer.source in ("generic", "retrieved") else None
    curated = curate.run(context, spec, adapted, indexed)
    taught = teach.run(context, curated, adapted, adapt.adapted(adapted, spec))
    decoded = labels.run(context, student.preprocess)
    moved = transfer.run(context, taught, decoded)
    tuned = finetune.run(context, moved, taught, decoded) if recipe.finetune.steps else moved
    models = {"student": (transfer.student_spec(context, tuned.stage), tuned.key)}
    floor = None
    if recipe.baselines.scratch:
        floor = finetune.run_scratch(context, decoded, booked=FLOOR)
        models[FLOOR] = (transfer.student_spec(context, floor.stage), floor.key)
    scored = evaluate.run(context, models, (adapt.adapted(adapted, spec), adapted.key))
    return Made(decoded, scored, tuned, adapted, indexed, curated, taught, moved, floor)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item and key not in ("kwargs",):
            out.update(_flat(item, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = json.dumps(item) if isinstance(item, dict | list) else item
    return out
