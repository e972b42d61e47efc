"""``--plan`` of a search: the baseline, the space, and how many trials the budget allows. Nothing is run."""

from __future__ import annotations

import logging

from ktray.accounting.device import describe_device
from ktray.jobs.tune.budget import limits, show
from ktray.jobs.tune.result import described
from ktray.jobs.tune.run import baseline, space_of
from ktray.jobs.tune.trial import STUDENTS
from ktray.pipeline.estimate import PlannedDevice
from ktray.pipeline.plan import this_machine
from ktray.pipeline.plan_gallery import missing_images
from ktray.pipeline.plan_work import PlannedWork, explain
from ktray.pipeline.select import BASELINES
from ktray.recipe.schema import Recipe
from ktray.reporting.units import flops, seconds, usd

logger = logging.getLogger("ktray")


def report(recipe: Recipe) -> None:
    """Log the plan of a search on this machine."""
    local = this_machine(recipe)
    logger.info(local.line)
    resolved = baseline(recipe, local)
    for reason in resolved.reasons:
        logger.info(f"recipe    {reason}")
    if missing := missing_images(resolved):
        logger.warning(f"WARNING: {missing}")
    space = space_of(resolved.recipe, local)
    for spec in space.specs:
        logger.info(f"space     {described(spec)}")
    device = PlannedDevice.of(resolved.recipe, describe_device())
    work = PlannedWork.of(resolved, local, device.gpu)
    estimates = {name: found for name, found in work.on(device).items() if name not in BASELINES}
    counted = {line.stage: line.flops for line in work.lines if line.stage in estimates}
    own = sum(counted.get(stage, 0.0) for stage in STUDENTS)
    shared = sum(counted.values()) - own
    own_seconds = sum(estimates[stage].device_seconds for stage in STUDENTS if stage in estimates)
    shared_seconds = sum(found.device_seconds for found in estimates.values()) - own_seconds
    part = resolved.recipe.tune
    logger.info("")
    logger.info(
        f"baseline  {flops(own + shared)}: {flops(own)} for the student, {flops(shared)} for stages that trials share"
    )
    first = part.rungs[0]
    logger.info(
        f"a trial   {flops(first * own)} to {flops(sum(part.rungs) * own)} with the steps of the baseline, and more "
        "for stages that it does not share"
    )
    logger.info(f"winner    at most {flops(part.seeds * own)} for {part.seeds} seeds")
    price = device.hourly
    for unit, limit in limits(resolved.recipe.budget).items():
        student, others = (own, shared) if unit == "flops" else (own_seconds, shared_seconds)
        each = (price or 0.0) / 3600 if unit == "usd" else 1.0
        rest = limit - ((1 + part.seeds) * student + others) * each
        count = max(0, int(rest / (first * student * each))) if student * each > 0 else 0
        fixed = f"the baseline and the winner take {show(unit, limit - rest)}"
        logger.info(f"budget    {show(unit, limit)}: {fixed}; the rest allows at most {count:,} first rungs")
    money = None if price is None else own_seconds * price / 3600
    logger.info("")
    logger.info(f"time      the baseline's student takes {seconds(own_seconds)} of device time, {usd(money)}")
    for line in explain([(device.name, {found.source for found in estimates.values() if found.device_seconds})]):
        logger.info(line)
