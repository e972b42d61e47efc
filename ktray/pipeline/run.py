"""Run a recipe: the seven stages in order, the run folder, and the log in MLflow."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from ktray.accounting.device import describe_device, device_name
from ktray.accounting.ledger import Ledger
from ktray.data.quarantine import BadLimit
from ktray.distributed.allocation import Allocation
from ktray.distributed.energy import cluster_joules
from ktray.distributed.machines import ClusterMachines
from ktray.distributed.watchdog import limited
from ktray.errors import KtrayError
from ktray.models.teacher.spec import TeacherSpec
from ktray.models.teacher.teacher import TeacherSource
from ktray.pipeline import results
from ktray.pipeline.checks import exportable
from ktray.pipeline.estimate import PlannedDevice, compared
from ktray.pipeline.failure import failure_recorded
from ktray.pipeline.graph import stages
from ktray.pipeline.plan_stages import lines, traffic_of
from ktray.pipeline.resolve import Resolved, resolve, resolve_gallery
from ktray.pipeline.run_folder import open_run, task_title
from ktray.pipeline.session import open_session
from ktray.pipeline.suggest import curation, student_folder
from ktray.recipe.load import dump, override
from ktray.recipe.schema import Recipe
from ktray.recipe.section import digest
from ktray.reporting.log import muted
from ktray.reporting.units import flatten
from ktray.stages.base import RunContext, Runtime, StageResult
from ktray.stages.index import stage as index
from ktray.stages.speed import StageLook
from ktray.storage.store import Store, local_home
from ktray.tracking.tags import run_tags
from ktray.tracking.tracker import Tracker, catch_up

logger = logging.getLogger("ktray")


def run(
    recipe: Recipe,
    debug: bool = False,
    plan: Allocation | None = None,
    tags: Mapping[str, str] | None = None,
    trial: bool = False,
    limit: Callable[[Ledger], None] | None = None,
) -> dict[str, Any]:
    """Run a recipe to its end; returns the content of ``result.json``.

    An unfinished run of the same recipe continues under its id. A finished run is not changed; a new run reuses its
    stages.

    Args:
        plan: the part of the cluster to use; None: the whole cluster.
        tags: additional tags of the MLflow run.
        trial: whether this is a trial: one of several runs that a job compares on validation. A trial does not read
            the test split and writes no student, report or model; a later run of the same recipe reuses all stages.
        limit: a function that is called with the ledger of the run about every second. An exception that it raises
            ends the run; the ledger keeps what was spent until then.
    """
    begun = time.time()

    def work(context: RunContext, resolved: Resolved) -> dict[str, Any]:
        # torch.export changes state of the whole process, and cannot run beside other runs (jobs/compare.py has several
        # in threads).
        if not trial and threading.current_thread() is threading.main_thread():
            for problem in exportable(context.recipe, len(context.task.classes)):
                logger.warning(problem)
        with limited(None if limit is None else partial(limit, context.ledger)):
            outputs = stages(context, trial)
        if trial:
            return results.write_trial(context, outputs, begun)
        return results.write(context, outputs, begun, _planned_and_taken(context, resolved))

    return logged_run(recipe, debug, plan, {**(tags or {}), **({"trial": "true"} if trial else {})}, work)


def curate_only(recipe: Recipe, debug: bool = False) -> dict[str, Any]:
    """Run the stages up to the transfer set, and SUGGEST if ``curate.suggest`` is set; returns the content of
    ``result.json``. A later run of the recipe reuses them. For an objective with several phases, this is the transfer
    set of the last phase.

    Raises:
        KtrayError: the recipe has no transfer set, or asks for suggestions that cannot be made.
    """
    from ktray.pipeline import results_transfer_set

    if not recipe.objective.has_transfer_set():
        raise KtrayError(f"objective.name={recipe.objective.name} has no transfer set", "Choose another objective.")
    begun = time.time()
    if recipe.curate.suggest and recipe.curate.student is not None:
        folder = student_folder(recipe.store, recipe.curate.student)
        recipe = override(recipe, {"curate.student": folder.uri})  # a place that holds wherever the recipe is run again

    def work(context: RunContext, resolved: Resolved) -> dict[str, Any]:
        curated, suggested = curation(context)
        return results_transfer_set.write(context, curated, begun, suggested)

    return logged_run(recipe, debug, None, {"job": "curate"}, work)


def index_only(recipe: Recipe, debug: bool = False) -> dict[str, Any]:
    """Run only INDEX; returns the content of ``result.json``. Runs with the same gallery, teacher and crops use this
    index."""
    from ktray.pipeline import results_transfer_set

    begun = time.time()

    def work(context: RunContext, resolved: Resolved) -> dict[str, Any]:
        done, spec = embed_gallery(context)
        return results_transfer_set.write_index(context, done, spec, begun)

    return logged_run(recipe, debug, None, {"job": "index"}, work, resolve_gallery)


def embed_gallery(context: RunContext) -> tuple[StageResult, TeacherSpec]:
    """Run INDEX with the teacher of the recipe."""
    t = context.recipe.teacher
    spec = TeacherSpec.of(TeacherSource(str(t.name), t.checkpoint, t.config, t.image_size))
    return index.run(context, spec), spec


def logged_run(
    recipe: Recipe,
    debug: bool,
    plan: Allocation | None,
    tags: Mapping[str, str],
    work: Callable[[RunContext, Resolved], dict[str, Any]],
    settle: Callable[[Recipe, Allocation], Resolved] = resolve,
) -> dict[str, Any]:
    """Run ``work`` in a run folder and log the run to MLflow, also when it fails.

    Args:
        plan: the part of the cluster to use; None: the whole cluster.
        tags: tags of the MLflow run. ``job`` is the name of the job, which is part of the run's identity.
        settle: chooses a value for each open key of the recipe.
    """
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(open_session(recipe, debug, plan))
        store, plan = session.store, session.allocation
        logger.info(plan.line)
        resolved = settle(recipe, plan)
        for reason in resolved.reasons:
            logger.info(f"recipe    {reason}")
        context = _open(store, resolved, plan, tags, stack)
        folder = store.run(context.run_id)
        stack.enter_context(failure_recorded(folder, context.run_id, time.time(), partial(_state, context)))
        status = "FAILED"
        try:
            result = work(context, resolved)
            status = "FINISHED"
            return result
        finally:
            context.tracker.finish(status)
            pending = context.tracker.close(timeout=60)
            context.tracker.tell(pending)
            if not pending:
                home = local_home(store)
                catch_up(home / "runs", recipe.mlflow.uri, recipe.mlflow.experiment, home)


def _state(context: RunContext) -> dict[str, Any]:
    """What is known of a run that failed."""
    ledger = context.ledger
    return {
        "stage": context.runtime.running[-1] if context.runtime.running else None,
        "cost": ledger.summary(),
        "stages": ledger.stages(),
        "mlflow": context.tracker.info(timeout=1.0),
    }


def _planned_and_taken(context: RunContext, resolved: Resolved) -> dict[str, Any]:
    """What was planned for the stages that this run computed, and what they took."""
    machines = context.runtime.machines
    assert machines is not None  # this is a run
    device = PlannedDevice.of_cluster(machines, context.plan)
    traffic = traffic_of(resolved) if device.gpu else {}
    return compared(lines(resolved), traffic, context.runtime.speeds, device, context.ledger.entries)


def look_at_stages(
    store: Store, resolved: Resolved, plan: Allocation, work: Callable[[RunContext], object] = stages
) -> StageLook:
    """For a plan: whether the store holds each stage of ``work`` completely, and what its speed depends on. This runs
    and writes nothing."""
    silent = cast(Tracker, None)  # no stage runs, so nothing is logged
    context = _context(store, resolved, plan, Ledger(describe_device()), silent, "plan")
    context.runtime.planned = seen = StageLook()
    with muted():
        work(context)
    return seen


def _open(
    store: Store, resolved: Resolved, plan: Allocation, tags: Mapping[str, str], until: contextlib.ExitStack
) -> RunContext:
    recipe = resolved.recipe
    text = dump(recipe)
    same = digest(text, resolved.fingerprint, tags.get("job"))
    run_id, folder = open_run(store, same, _title(recipe, tags), until)
    folder.write("recipe.yaml", text.encode())
    local = local_home(store)
    tracker = Tracker(
        recipe.mlflow.uri,
        recipe.mlflow.experiment,
        local / "runs" / run_id / "log.jsonl",
        local / "runs" / run_id / "mlflow.json",
        local,
        also=recipe.mlflow.also,
    )
    tracker.start(
        run_id,
        params=logged_params(recipe),
        tags=run_tags(
            recipe.mlflow,
            {"task": str(recipe.task.name or recipe.task.data), "objective": recipe.objective.name, **tags},
        ),
    )
    logger.info(f"run       {folder.uri}")
    ledger = Ledger(describe_device(), run_id, recipe.prices, cluster_joules())
    return _context(store, resolved, plan, ledger, tracker, run_id, ClusterMachines(plan, recipe.prices))


def _context(
    store: Store,
    resolved: Resolved,
    plan: Allocation,
    ledger: Ledger,
    tracker: Tracker,
    run_id: str,
    machines: ClusterMachines | None = None,
) -> RunContext:
    recipe = resolved.recipe
    return RunContext(
        recipe=recipe,
        runtime=Runtime(
            store=store,
            plan=plan,
            ledger=ledger,
            tracker=tracker,
            run_id=run_id,
            cluster=recipe.cluster,
            bad_limit=BadLimit(recipe.data.max_bad_fraction, recipe.data.max_bad_images),
            machines=machines,
            device=machines.name() if machines else device_name(ledger.device, bool(plan.worker_gpus)),
        ),
        task=resolved.task,
        class_names=resolved.class_names,
        prompts=resolved.prompts,
        canvas=resolved.canvas,
        metric=str(recipe.task.metric),
        source=resolved.source,
    )


def _title(recipe: Recipe, tags: Mapping[str, str]) -> str:
    job = tags.get("job")
    if job == "index":
        return job
    return f"{task_title(recipe)}-{'predict' if job == 'predict' else recipe.objective.name}"


def logged_params(recipe: Recipe) -> dict[str, Any]:
    """The recipe as parameters of an MLflow run, by dotted key; lists and keyword arguments as JSON."""
    whole = flatten(
        recipe.model_dump(mode="json"),
        keep=lambda name, value: isinstance(value, list) or not value or name.endswith(".kwargs"),
    )
    texts = {key: json.dumps(value) if isinstance(value, dict | list) else value for key, value in whole.items()}
    return {key: value for key, value in texts.items() if value is not None}
