"""The default search space, if ``tune.space`` is empty: the most important keys, around the values of the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ktray.recipe.choice import objectives, strategies
from ktray.recipe.objective import ObjectiveConfig
from ktray.recipe.schema import Recipe
from ktray.tasks.base import task_kind

# Small networks of timm in addition to the recipe's own student, by rising cost; first those for a CPU.
STUDENTS_CPU = ("mobilenetv3_small_050", "efficientnet_lite0")
STUDENTS_GPU = ("fastvit_s12", "mobilenetv3_large_100", "vit_small_patch16_224")


def default_space(recipe: Recipe, text: bool, on_gpu: bool) -> dict[str, Any]:
    """Return a space in the form of ``tune.space``.

    Args:
        recipe: the baseline, resolved.
        text: whether the teacher has a text tower.
        on_gpu: whether students are trained on GPUs.
    """
    size, steps = int(recipe.transfer.size or 0), int(recipe.train.steps or 1)
    batch, lr = int(recipe.train.batch_size or 1), float(recipe.train.lr or 0)
    kind = task_kind(recipe.task.kind)
    searched = [config() for config in objectives() if config.searched]
    searched = [config for config in searched if kind.image_classes or not config.traits.classes]
    text = text and "text" in kind.candidates(
        recipe.teacher.model_copy(update={"adapt": "auto", "candidates": ["text", "probe"]}), has_text=True
    )
    chosen = [config for config in strategies() if config.searched]
    chosen = [config for config in chosen if kind.image_classes or not config.needs_predictions]
    space: dict[str, Any] = {}
    if recipe.gallery.data is not None or recipe.gallery.index is not None:
        drawn = {"transfer.source": ["retrieved"]}
        space["transfer.source"] = ["retrieved", "generic"]
        space["transfer.strategy"] = {
            "choices": [config.strategy_name() for config in chosen],
            "when": drawn,
        }
        space["transfer.size"] = sorted({max(1, size // 2), size})
        if kind.image_classes or kind.label_sets:
            space["transfer.per"] = {"choices": ["query", "class"], "when": drawn}
        if text:
            space["transfer.queries"] = {"choices": ["images", "text", "both"], "when": drawn}
        space["transfer.repeat_similarity"] = {"choices": [None, 0.95], "when": drawn}
    views = recipe.teach.view_count
    space["teach.views"] = sorted({max(1, views // 2), views})
    space["objective.name"] = [config.name for config in searched]
    # An objective that does not compare predictions uses the frozen teacher.
    predicting = [config.name for config in searched if "logits" in config.traits.targets_needed]
    adapted = {"choices": [*(["text"] if text else []), "probe", "finetune"], "when": {"objective.name": predicting}}
    if predicting:
        space["teacher.adapt"] = adapted
    space |= _objective_keys(searched)
    space["student"] = students(recipe, on_gpu)
    space["train.steps"] = {"low": max(1, steps // 4), "high": steps} if steps > 4 else [steps]
    space["train.batch_size"] = sorted({max(1, batch // 4), max(1, batch // 2), batch})
    space["train.lr"] = {"low": lr / 4, "high": lr * 4, "log": True}
    space["train.weight_decay"] = {"low": 0.005, "high": 0.2, "log": True}
    space["train.ema"] = [0.0, 0.98, 0.99]
    replaying = [config.name for config in searched if config.traits.replays and not config.traits.labelled]
    if replaying:
        low, high = recipe.finetune.lr / 4, recipe.finetune.lr * 4
        space["finetune.lr"] = {"low": low, "high": high, "log": True, "when": {"objective.name": replaying}}
    return space


def _objective_keys(searched: Sequence[ObjectiveConfig]) -> dict[str, Any]:
    """Return the objectives' own keys, each under the condition of the objectives that search it in the same way."""
    specs: dict[str, Any] = {}
    names: dict[str, list[str]] = {}
    for config in searched:
        for key, value in config.search_space().items():
            key = f"objective.{key}"
            spec = value if isinstance(value, dict) else {"choices": value}
            if specs.setdefault(key, spec) == spec:
                names.setdefault(key, []).append(config.name)
    return {
        key: {**spec, "when": {**spec.get("when", {}), "objective.name": names[key]}} for key, spec in specs.items()
    }


def students(recipe: Recipe, on_gpu: bool) -> list[dict[str, Any]]:
    """Return the recipe's own student and others, each with its arguments."""
    own = {"name": recipe.student.name, "kwargs": recipe.student.kwargs}
    if recipe.student.checkpoint:  # the weights fit only this model
        return [own]
    others = STUDENTS_GPU if on_gpu else STUDENTS_CPU
    return [own, *({"name": name, "kwargs": {}} for name in others if name != own["name"])]
