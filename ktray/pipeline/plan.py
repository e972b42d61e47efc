"""``--plan``: the stages of a run, which of them the store holds already, and what the others will cost. Nothing runs.

Time and money follow from the speeds that runs with this store have measured on such a device, else from those that
ktray ships, else from a roofline (`ktray.pipeline.estimate`). The ledger of a run has the measured values, and its
``result.json`` compares them with the plan.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from ktray.accounting.device import describe_device
from ktray.distributed.allocation import Allocation, allocate
from ktray.pipeline.checks import exportable
from ktray.pipeline.estimate import Estimate, PlannedDevice
from ktray.pipeline.graph import stages
from ktray.pipeline.plan_gallery import gallery_images, given_embeddings, missing_images
from ktray.pipeline.plan_stages import TRAFFIC, Line, lines, models_text, suggest_line, teacher_cost
from ktray.pipeline.plan_work import PlannedWork, explain, look, named_facts
from ktray.pipeline.resolve import Resolved, resolve, resolve_gallery
from ktray.pipeline.run import embed_gallery
from ktray.pipeline.suggest import curation
from ktray.recipe.schema import Recipe
from ktray.retrieval.crops import Crops
from ktray.stages.base import RunContext
from ktray.stages.speed import measured_speeds
from ktray.storage.store import Store

logger = logging.getLogger("ktray")

HEAD = f"\n{'stage':<10}{'in store':<10}{'FLOPs':>12}{'device-hours':>14}{'USD':>10}{'store':>10}  {'speed':<10}what"


def this_machine(recipe: Recipe) -> Allocation:
    """How the recipe would use this machine."""
    device = describe_device()
    gpus = device.get("gpus") or []
    cores = max(2.0, float(device["cores"]))
    low, high = recipe.cluster.span
    nodes = low if low < high else 1  # on CPUs each worker has a node; assume that all nodes are like this one
    return allocate(
        cores * nodes, float(len(gpus)), nodes, (low, high), recipe.cluster.use_gpu, gpu_share=recipe.cluster.gpu_share
    )


def show(recipe: Recipe) -> None:
    """Print the plan for this machine, also when ``RAY_ADDRESS`` is set.

    Args:
        recipe: the recipe, resolved or not.
    """
    _show(recipe, lines, stages, models_text)


def show_curate(recipe: Recipe) -> None:
    """`show` for jobs/curate.py: the stages up to the transfer set, and the suggestions."""

    def curated(resolved: Resolved) -> list[Line]:
        planned = lines(resolved)
        last = next((i for i, line in enumerate(planned) if line.stage == "curate"), len(planned) - 1)
        return planned[: last + 1] + ([suggest_line(resolved)] if resolved.recipe.curate.suggest else [])

    _show(recipe, curated, curation)


def _show(
    recipe: Recipe,
    lines_of: Callable[[Resolved], list[Line]],
    run_all: Callable[[RunContext], object],
    more: Callable[[Resolved], str] | None = None,
) -> None:
    local = this_machine(recipe)
    logger.info(local.line)
    resolved = resolve(recipe, local)
    for reason in resolved.reasons:
        logger.info(f"recipe    {reason}")
    if more:
        logger.info(f"student   {more(resolved)}")
    device = PlannedDevice.of(resolved.recipe, describe_device())
    work = PlannedWork.of(resolved, local, device.gpu, lines_of, run_all)
    if missing := missing_images(resolved):
        logger.warning(f"WARNING: {missing}")
    for problem in exportable(resolved.recipe, len(resolved.task.classes)):
        logger.warning(problem)
    logger.info(HEAD)
    estimates = work.on(device)
    total, spent, sources = (0.0, 0.0), (0.0, 0.0), set[str]()
    for line in work.lines:
        there, found = work.whole.get(line.stage, False), estimates[line.stage]
        total = total[0] + line.flops, total[1] + found.device_seconds
        if not there:
            spent = spent[0] + line.flops, spent[1] + found.device_seconds
        sources.add(found.source)
        state = "reused" if there else "to run"
        logger.info(_row(line.stage, state, line.flops, found, device.hourly, line.store_bytes, line.what))
    logger.info(_row("total", "", total[0], Estimate(total[1], ""), device.hourly, 0, ""))
    if spent != total:
        text = "excludes the stages that are reused"
        logger.info(_row("to spend", "", spent[0], Estimate(spent[1], ""), device.hourly, 0, text))
    _explain(device, sources)
    known = work.unknown or "complete stages in the store are reused at no cost"
    logger.info(f"store     {resolved.recipe.store}; {known}")


def _explain(device: PlannedDevice, sources: set[str]) -> None:
    logger.info("")
    for line in explain([(device.name, sources)]):
        logger.info(line)


def show_index(recipe: Recipe) -> None:
    """Print the plan for embedding the gallery. Nothing runs."""
    local = this_machine(recipe)
    resolved = resolve_gallery(recipe, local)
    for reason in resolved.reasons:
        logger.info(f"recipe    {reason}")
    device = PlannedDevice.of(resolved.recipe, describe_device())
    teacher = teacher_cost(resolved.recipe)
    images, images_text = gallery_images(resolved)
    crops = Crops(recipe.gallery.crops, recipe.gallery.crop_count).most
    rows = images * crops
    embedded = rows - given_embeddings(recipe)
    logger.info(HEAD)
    what = f"{images_text} gallery images" + (f", {crops} embeddings each" if crops > 1 else "")
    line = Line("index", teacher.tower * embedded, rows * (teacher.width * 2 + 100), what, rows)
    traffic = {"index": teacher_cost(resolved.recipe, TRAFFIC).tower * embedded} if device.gpu else {}
    store = Store(resolved.recipe.store)
    seen, _ = look(store, resolved, local, embed_gallery)
    work = PlannedWork([line], traffic, {**named_facts(resolved.recipe), **seen.facts}, measured_speeds(store))
    found = work.on(device)["index"]
    logger.info(_row("index", "", line.flops, found, device.hourly, line.store_bytes, what))
    _explain(device, {found.source})
    logger.info("shards that are already in the index cost nothing")


def _row(stage: str, state: str, flops: float, found: Estimate, price: float | None, stored: float, what: str) -> str:
    hours = found.device_seconds / 3600
    usd = f"{hours * price:.4f}" if price is not None else "?"
    size = f"{stored / 1e6:.1f} MB" if stored else ""
    return f"{stage:<10}{state:<10}{flops:>12.3g}{hours:>14.4f}{usd:>10}{size:>10}  {found.source:<10}{what}"
