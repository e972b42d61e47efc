"""Values for the section ``teach`` that the recipe leaves open: the number of views, and what is stored of them."""

from __future__ import annotations

import logging
import math

from ktray.distributed.allocation import Allocation
from ktray.errors import KtrayError
from ktray.pipeline.image_kinds import are_photographs
from ktray.pipeline.published import Choose
from ktray.recipe.schema import Recipe
from ktray.targets.jpeg import view_bytes
from ktray.targets.mode import choose_mode, free_bytes
from ktray.targets.top_k import per_prediction
from ktray.tasks.base import task_kind

VIEWS, VIEWS_PHOTOGRAPHS = 4, 8
MANY_USES = 16  # of one view in a training: then a student begins to learn the views by heart

logger = logging.getLogger("ktray")


def choose_teaching(recipe: Recipe, plan: Allocation, images: int, classes: int, choose: Choose) -> None:
    """Set ``teach.views``, ``teach.top_k`` and ``teach.mode``, where they are open.

    Args:
        images: size of the transfer set.
        classes: number of classes of the task.
        choose: sets an open key of the recipe; its arguments are the key, the value and the reason.

    Raises:
        KtrayError: the mode does not fit the objective or the cluster.
    """
    name, traits, size = recipe.objective.name, recipe.objective.traits, int(recipe.image_size or 32)
    drawn = int(recipe.train.steps or 1) * int(recipe.train.batch_size or 1)
    if recipe.teach.views == "auto":
        if are_photographs(recipe):
            # More views than training uses would be computed for nothing.
            used = max(1, min(VIEWS_PHOTOGRAPHS, drawn // max(1, images)))
            why = (
                "photographs"
                if used == VIEWS_PHOTOGRAPHS
                else f"training uses {drawn / max(1, images):.1f} of each image"
            )
            choose("teach.views", used, why)
        else:
            recipe.teach.views = VIEWS
    views = recipe.teach.view_count if traits.views == "fixed" else 1
    exclusive = task_kind(recipe.task.kind).matching.exclusive
    if recipe.teach.top_k != "auto" and recipe.teach.top_k and not exclusive:
        choose("teach.top_k", 0, "the probabilities of the other classes have no total, because they are independent")
    if recipe.teach.top_k == "auto":
        if classes > 2000 and exclusive:
            choose("teach.top_k", 200, f"{classes:,} classes")
        else:
            recipe.teach.top_k = 0
    elif recipe.teach.top_k >= classes:
        choose("teach.top_k", 0, f"there are {classes:,} classes")
    if traits.sampled and recipe.teach.mode in ("live", "streamed"):
        raise KtrayError(
            f"objective.name={name} needs stored embeddings of the teacher before the first step, and "
            f"teach.mode={recipe.teach.mode} stores none",
            "Set teach.mode=cached.",
        )
    if recipe.teach.mode == "auto" and traits.sampled:
        choose("teach.mode", "cached", f"{name} needs stored embeddings before the first step")
    if recipe.teach.mode == "auto":
        row_bytes = view_bytes(size, recipe.teach.jpeg) + 2 * per_prediction(classes, int(recipe.teach.top_k))
        streaming = (
            plan.streaming if plan.worker_gpus else 0
        )  # on CPUs a teacher that runs during training takes cores from it
        mode, why = choose_mode(images * views, drawn, row_bytes, free_bytes(recipe.store), streaming)
        if mode == "live" and recipe.transfer.weight != "none":
            mode, why = "cached", "transfer.weight reads the teacher's predictions before images are drawn"
        choose("teach.mode", mode, why)
    if recipe.teach.mode == "live" and recipe.transfer.weight != "none":
        raise KtrayError(
            f"transfer.weight={recipe.transfer.weight} needs the teacher's predictions before images are drawn, and "
            "teach.mode=live computes them afterwards",
            "Set teach.mode=cached, or transfer.weight=none.",
        )
    if recipe.teach.mode == "streamed" and not plan.streaming:
        raise KtrayError(
            f"teach.mode=streamed needs a second GPU for the teacher of each worker, and {plan.workers} workers have "
            f"{plan.total_gpus:g} GPUs in total",
            "Set cluster.workers to at most half of the GPUs, or teach.mode=cached.",
        )
    uses = drawn / max(1, images * views)
    stored = recipe.objective.has_transfer_set() and recipe.teach.mode == "cached" and traits.views == "fixed"
    if stored and uses > MANY_USES:
        more = math.ceil(drawn / images / MANY_USES)
        logger.warning(
            f"WARNING: training uses each stored view {uses:.0f} times; a small student then learns the views by "
            f"heart. Set teach.views={more}, or a larger transfer.size, or objective.mixup=0.8."
        )
