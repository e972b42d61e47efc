"""The registries of things that one file can add to ktray, each with its folder, recipe key and entry point group.

The ``base.py`` of a folder describes the things in its registry.
"""

from __future__ import annotations

from typing import Any

from ktray.recipe.objective import ObjectiveConfig
from ktray.recipe.registry import Registry
from ktray.recipe.strategy import StrategyConfig

OBJECTIVES: Registry[type[ObjectiveConfig]] = Registry(
    "objective", "objective.name", "ktray.objectives", "ktray.objectives"
)
STRATEGIES: Registry[type[StrategyConfig]] = Registry(
    "strategy", "transfer.strategy", "ktray.retrieval.strategies", "ktray.strategies"
)
TASKS: Registry[Any] = Registry("task kind", "task.kind", "ktray.tasks", "ktray.tasks")
TEACHERS: Registry[Any] = Registry("teacher family", "teacher.name", "ktray.models.teacher.families", "ktray.teachers")
SOURCES: Registry[Any] = Registry("source", "gallery.data", "ktray.data.sources", "ktray.sources")
SCHEMES: Registry[Any] = Registry("kind of address", "gallery.data", "ktray.storage.schemes", "ktray.schemes")
EXPORTS: Registry[Any] = Registry("export target", "export.targets", "ktray.jobs.export.targets", "ktray.exports")
TRACKERS: Registry[Any] = Registry("tracker", "mlflow.uri", "ktray.tracking", "ktray.trackers")
