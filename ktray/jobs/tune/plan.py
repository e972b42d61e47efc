"""``--plan`` of a search: the baseline, the space, and how many trials the budget allows. Nothing is run."""

from __future__ import annotations

import logging

from ktray.jobs.tune.budget import limits, show
from ktray.jobs.tune.result import described
from ktray.jobs.tune.run import baseline, space_of
from ktray.jobs.tune.trial import STUDENTS
from ktray.pipeline.plan import machine, this_machine
from ktray.pipeline.plan_stages import lines
from ktray.recipe.schema import Recipe
from ktray.reporting.units import flops, seconds

logger = logging.getLogger("ktray")


def report(recipe: Recipe) -> None:
    """Log the plan of a search on this machine."""
    local = this_machine(recipe)
    logger.info(local.line)
    resolved = baseline(recipe, local)
    for reason in resolved.reasons:
        logger.info(f"recipe    {reason}")
    space = space_of(resolved.recipe, local)
    for spec in space.specs:
        logger.info(f"space     {described(spec)}")
    rate, price, kind = machine(resolved.recipe)
    planned = {line.stage: line.flops for line in lines(resolved) if line.stage not in ("scratch", "start")}
    own = sum(planned.get(stage, 0.0) for stage in STUDENTS)
    shared = sum(planned.values()) - own
    part = resolved.recipe.tune
    logger.info("")
    logger.info(
        f"baseline  {flops(own + shared)}: {flops(own)} for the student, {flops(shared)} for stages that trials share"
    )
    first = own * part.rungs[0]
    logger.info(
        f"a trial   {flops(first)} to {flops(sum(part.rungs) * own)} with the steps of the baseline, and more for "
        "stages that it does not share"
    )
    winner = part.seeds * own
    logger.info(f"winner    at most {flops(winner)} for {part.seeds} seeds")
    for unit, limit in limits(resolved.recipe.budget).items():
        each = {"flops": 1.0, "device_seconds": 1 / rate, "wall": 1 / rate, "usd": (price or 0.0) / rate / 3600}[unit]
        rest = limit - (own + shared + winner) * each
        count = max(0, int(rest / (first * each))) if first * each > 0 else 0
        fixed = f"the baseline and the winner take {show(unit, limit - rest)}"
        logger.info(f"budget    {show(unit, limit)}: {fixed}; the rest allows at most {count:,} first rungs")
    logger.info(
        f"\nThe plan assumes {rate / 1e12:.3g} TFLOP/s on {kind}: {seconds(own / rate)} for the baseline's student."
    )
    logger.info("It omits decoding and start-up.")
