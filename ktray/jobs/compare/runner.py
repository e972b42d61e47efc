"""The pipelines of a comparison, and its folder, which records the finished ones."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ktray.distributed.allocation import Allocation
from ktray.jobs.compare.parallel import run_all
from ktray.pipeline.run import run as pipeline
from ktray.pipeline.run_folder import open_run, task_title
from ktray.recipe.load import dump
from ktray.recipe.schema import Recipe
from ktray.recipe.section import digest
from ktray.reporting.log import titled
from ktray.storage.store import Dir, Store
from ktray.tracking.tags import RUN_NAME
from ktray.tracking.tracker import WAY

logger = logging.getLogger("ktray")


def open_folder(store: Store, recipe: Recipe, until: contextlib.ExitStack) -> tuple[str, Dir]:
    """Open the folder of an unfinished comparison of the same recipe, otherwise a new folder."""
    return open_run(store, digest("compare", dump(recipe)), f"compare-{task_title(recipe)}", until)


@dataclass
class Runner:
    """Runs each recipe once, with ``at_once`` recipes at the same time.

    Attributes:
        whole: allocation of the whole cluster.
        share: allocation of one pipeline.
        results: result of every recipe requested so far, by its digest; they contain what this comparison spent.
    """

    store: Store
    folder: Dir
    whole: Allocation
    share: Allocation
    at_once: int
    debug: bool = False
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(
        self, jobs: Sequence[tuple[str, Recipe]], at_once: int | None = None, trial: bool = False
    ) -> list[dict[str, Any]]:
        """Return the results of named recipes, in order. Recipes that this comparison has finished are read, not run.

        Args:
            jobs: name and recipe of each run.
            at_once: number of recipes at the same time; None: ``self.at_once``.
            trial: whether the runs are trials, which do not read the test split.
        """
        keys = [digest(dump(recipe), trial) for _, recipe in jobs]
        todo: dict[str, tuple[str, Recipe]] = {}
        for key, job in zip(keys, jobs, strict=True):
            if key not in self.results and not self._finished(key):
                todo.setdefault(key, job)
        width = self.at_once if at_once is None else at_once
        run_all(
            [
                partial(self._one, key, f"{number}/{len(todo)}: {name}", recipe, width, trial)
                for number, (key, (name, recipe)) in enumerate(todo.items(), 1)
            ],
            width,
        )
        return [self.results[key] for key in keys]

    def _one(self, key: str, title: str, recipe: Recipe, width: int, trial: bool) -> None:
        name = title.partition(": ")[2]
        logger.info(f"\ncompare   {title}, seed {recipe.seed}")
        comparison = self.folder.uri.rstrip("/").rpartition("/")[2]
        tags = {"compare": comparison, WAY: name, RUN_NAME: f"{name}, seed {recipe.seed}"}
        plan = None if self.share is self.whole else self.share
        with titled(None if width <= 1 else name):
            self.results[key] = pipeline(recipe, self.debug, plan=plan, tags=tags, trial=trial)
        self.folder.write_json(f"done/{key}.json", {"run": self.results[key]["run_id"]})

    def _finished(self, key: str) -> bool:
        if not self.folder.exists(f"done/{key}.json"):
            return False
        run = self.store.run(str(self.folder.read_json(f"done/{key}.json")["run"]))
        if not run.exists("result.json"):
            return False
        result = run.read_json("result.json")
        if result.get("status", "finished") != "finished":
            return False
        self.results[key] = result
        return True
