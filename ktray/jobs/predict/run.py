"""jobs/predict.py: predicts every image of a folder, a bucket or a list with the student or the teacher of a run."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ktray.accounting.device import describe_device, versions
from ktray.accounting.summary import cost_summary
from ktray.data import filesystem
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.sources.base import Shard
from ktray.data.sources.lists import gallery_shards
from ktray.data.sources.missing_shards import missing_shards
from ktray.distributed.allocation import Allocation
from ktray.errors import KtrayError
from ktray.jobs.predict.decode import DecodeShard
from ktray.jobs.predict.folder import PredictionFolder
from ktray.jobs.predict.models import ChosenModel, choose, traffic_of_image
from ktray.jobs.predict.stage import STAGE, PredictInputs, PredictShard, work
from ktray.pipeline.estimate import PlannedDevice
from ktray.pipeline.finished_run import FinishedRun, find_run
from ktray.pipeline.plan import this_machine
from ktray.pipeline.plan_stages import Line
from ktray.pipeline.plan_work import PlannedWork, explain
from ktray.pipeline.resolve import Resolved
from ktray.pipeline.run import logged_run
from ktray.recipe.schema import Recipe
from ktray.recipe.section import digest
from ktray.reporting.result import SCHEMA, PredictResult, finished, write_result
from ktray.reporting.units import flops, percent, seconds, usd
from ktray.stages.base import RunContext, StageResult, run_stage
from ktray.stages.speed import StageLook, measured_speeds
from ktray.storage.store import Dir
from ktray.tracking.metrics import stable_metrics

logger = logging.getLogger("ktray")

_SHOWN = 5  # classes in the closing lines


def predict(requested: Recipe, debug: bool = False) -> dict[str, Any]:
    """Write the predictions for all images of ``predict.data``; returns the content of ``result.json``.

    A killed job continues with the shards that are missing. If images were added since, only shards with new images are
    computed. Afterwards, the folder has each usable image once.

    Raises:
        KtrayError: there is no such run or model, the images cannot be read, too many of them are unusable, or the
            folder has other predictions.
    """
    begun = time.time()
    source = find_run(requested, "predict")
    recipe, shards = _recipe(source, requested), _shards(requested)

    def settle(recipe: Recipe, plan: Allocation) -> Resolved:
        counts = [shard.count for shard in shards]
        images = None if None in counts else sum(c or 0 for c in counts)
        fingerprint = digest([shard.fingerprint for shard in shards])
        return Resolved(recipe, LabelledSet([], [], [], []), [], [], fingerprint, 1.0, images, None, [])

    def run(context: RunContext, resolved: Resolved) -> dict[str, Any]:
        model = choose(source, recipe.predict.model, context.plan.actor_gpus > 0)
        inputs = _inputs(source, context.recipe, model, shards)

        def whole(manifest: dict[str, Any]) -> bool:
            return len(inputs.folder.finished(inputs.names)) == len(inputs.names)

        done = run_stage(context.runtime, inputs, work, whole=whole)
        return _write(context, source, model, done, begun)

    return logged_run(recipe, debug, None, {"job": "predict"}, run, settle)


def _recipe(source: FinishedRun, requested: Recipe) -> Recipe:
    """The recipe of the job: that of the run, with everything that the caller sets for this job."""
    recipe = source.recipe.model_copy(deep=True)
    recipe.predict = requested.predict.model_copy(update={"run": source.folder.uri})
    for name in ("cluster", "data", "prices"):
        setattr(recipe, name, getattr(requested, name))
    recipe.mlflow.run_name, recipe.mlflow.tags = requested.mlflow.run_name, requested.mlflow.tags
    # Nodes do not need files that this model is not loaded from.
    recipe.student.checkpoint = None
    if recipe.predict.model == "student":
        recipe.teacher.checkpoint = None
    return recipe


def _shards(requested: Recipe) -> list[Shard]:
    part = requested.predict
    if part.data is None:
        raise KtrayError("predict.data is not set", "Set predict.data to the images: a folder, tars, Parquet or CSV.")
    found = {shard.fingerprint: shard for shard in gallery_shards(part.data, part.column, None)}
    for note in missing_shards(path for shard in found.values() for path in shard.paths):
        logger.warning(note)
    return list(found.values())


def _inputs(source: FinishedRun, recipe: Recipe, model: ChosenModel, shards: Sequence[Shard]) -> PredictInputs:
    part = recipe.predict
    entries = [part.data] if isinstance(part.data, str) else list(part.data or [])
    facts = {
        "model": model.identity,
        "probabilities": part.probabilities,
        "embedding": part.embedding,
        "max_pixels": recipe.data.max_pixels,
        "data": sorted(filesystem.normalise(entry) for entry in entries),
        "column": part.column,
    }
    if model.thresholds is not None:
        facts["thresholds"] = list(model.thresholds)
    folder = PredictionFolder(Dir(part.out or source.store.file(f"predictions/{digest('predictions', facts)}")))
    counts = [shard.count for shard in shards]
    return PredictInputs(
        names=[shard.fingerprint for shard in shards],
        facts=facts,
        out=part.out,
        items=[{"shard": i, "name": shard.fingerprint} for i, shard in enumerate(shards)],
        decode=DecodeShard(list(shards), model.preprocess, recipe.data.max_pixels),
        score=PredictShard(
            folder, model.source, model.classes, part.probabilities, part.embedding, model.flops, model.thresholds
        ),
        total=None if None in counts else sum(c or 0 for c in counts),
        named=model.name,
    )


def _write(
    context: RunContext, source: FinishedRun, model: ChosenModel, done: StageResult, begun: float
) -> dict[str, Any]:
    facts, part = done.manifest, context.recipe.predict
    folder = context.store.run(context.run_id)
    context.runtime.quarantine.write(folder.file("quarantine.parquet"))
    entries = [e for e in context.ledger.entries if e.stage == STAGE]
    spent = [e for e in entries if not e.cached]
    images, wall = sum(e.images for e in spent), sum(e.wall_seconds for e in spent)
    cost = cost_summary(entries, (STAGE,))
    price = cost["usd"]
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "run_id": context.run_id,
        "folder": folder.uri,
        "model": {"run": source.run_id, "which": part.model, "name": model.name, "classes": len(model.classes)},
        "predictions": {
            "folder": facts["folder"],
            "files": facts["files_written"],
            "bytes": facts["bytes"],
            "shards": facts["shards"],
            "images": facts["images"],
            "embedding": model.width if part.embedding else None,
        },
        "counts": facts["counts"],
        "confidence": facts["confidence"],
        "images_per_second": images / wall if images else None,
        "usd_per_million": price / images * 1e6 if images and price is not None else None,
        "data": {
            "read": context.runtime.read,
            "quarantined": context.runtime.quarantine.images(),
            "reasons": dict(Counter(bad.reason for bad in context.runtime.quarantine)),
            "quarantine_list": folder.file("quarantine.parquet"),
        },
        "cost": cost,
        "stages": context.ledger.stages(),
        "mlflow": context.tracker.info(),
        "versions": versions(),
        "device": dict(context.ledger.device),
        **finished(begun),
        "wall_seconds": round(time.time() - begun, 2),
    }
    result = write_result(folder, PredictResult(**content))
    numbers = {"predict.images": float(facts["images"]), "predict.confidence": float(facts["confidence"])}
    if result["images_per_second"]:
        numbers["predict.images_per_second"] = float(result["images_per_second"])
    context.tracker.final({**stable_metrics(result), **numbers})
    for name in ("result.json", "recipe.yaml", "quarantine.parquet"):
        context.tracker.stored(folder, name)
    folder.delete("running.json")
    return result


def closing(result: dict[str, Any]) -> str:
    """The last lines of the job, for people: how many images, how fast, for how much, and where the files are."""
    files, data, rate, counts = result["predictions"], result["data"], result["images_per_second"], result["counts"]
    most = sorted(counts.items(), key=lambda item: -item[1])[:_SHOWN]
    more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
    speed = "all of them were in the folder before"
    if rate is not None:
        cost = result["cost"]
        speed = f"{rate:,.1f} images/s, {seconds(cost['wall_seconds'])}, {usd(cost['usd'])}"
    return "\n".join(
        (
            f"predicted {files['images']:,} images ({speed}); {data['quarantined']:,} cannot be used",
            f"classes   {', '.join(f'{name} {number:,}' for name, number in most)}{more}; mean probability "
            f"{percent(result['confidence'])}",
            f"files     {files['folder']}: {files['files']:,} Parquet files",
            f"result    {result['folder']}/result.json",
        )
    )


def show(requested: Recipe) -> None:
    """Log the plan: model, images, what is in the folder already, and the cost of the rest. Nothing runs."""
    source, shards = find_run(requested, "predict"), _shards(requested)
    recipe, local = _recipe(source, requested), this_machine(requested)
    model = choose(source, recipe.predict.model, local.actor_gpus > 0)
    inputs = _inputs(source, recipe, model, shards)
    there = inputs.folder.finished(inputs.names)
    todo = [shard for shard in shards if shard.fingerprint not in there]
    known = [shard.count for shard in todo if shard.count is not None]
    unknown = "" if len(known) == len(todo) else " and those of tar shards, whose number is not known before reading"
    device = PlannedDevice.of(recipe, describe_device())
    images = sum(known)
    line = Line(STAGE, model.flops * images, 0, "", images)
    seen = StageLook()
    seen.see(STAGE, inputs, not todo)
    traffic = {STAGE: traffic_of_image(model) * images} if device.gpu else {}
    found = PlannedWork([line], traffic, seen.facts, measured_speeds(source.store)).on(device)[STAGE]
    hours = found.device_seconds / 3600
    bill = f"{hours * device.hourly:.4f} USD" if device.hourly is not None else "an unknown price"
    logger.info(f"run       {source.folder.uri}")
    logger.info(
        f"{recipe.predict.model:<9} {model.name}, {len(model.classes)} classes, {model.flops:.3g} FLOPs an image"
    )
    logger.info(f"images    {len(shards):,} shards, {len(there):,} of them are in {inputs.folder.home.uri}")
    logger.info(f"to do     {images:,} images{unknown}: {flops(line.flops)}, {hours:.4f} device-hours, {bill}")
    for text in explain([(device.name, {found.source})]):
        logger.info(text)
