"""How long a method takes on this cluster: the device time of one training step, and of everything else.

Each method is measured with two short runs. Their training loops differ only in the number of steps, so the difference
of their times is the time of the steps alone, without start-up, validation and checkpoints. The measured speeds are
kept in the store, so that a restart, and the next comparison on this store, use the same numbers of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ktray.accounting.device import cpu_model
from ktray.distributed.allocation import Allocation
from ktray.jobs.compare.methods import Methods, recipe_of
from ktray.recipe.load import dump
from ktray.recipe.schema import Recipe
from ktray.recipe.section import digest
from ktray.storage.store import Store

SHORT, LONG = 20, 80


@dataclass(frozen=True)
class MeasuredSpeed:
    """The device time of a run, as a line in its steps.

    Attributes:
        fixed: device-seconds that do not grow with the steps.
        step: device-seconds of one step.
    """

    fixed: float
    step: float

    def total(self, steps: int) -> float:
        return self.fixed + steps * self.step

    def within(self, seconds: float) -> int:
        """Return the largest number of steps that takes at most ``seconds``; 0 if one step takes longer. For a method
        that takes no steps, it is 1."""
        if not self.step:
            return int(self.fixed <= seconds)
        return max(0, int((seconds - self.fixed) / self.step + 1e-9))


def measure(
    base: Recipe,
    methods: Methods,
    store: Store,
    plan: Allocation,
    run: Callable[[list[tuple[str, Recipe]]], list[dict[str, Any]]],
) -> dict[str, MeasuredSpeed]:
    """Return the speed of each method, from the store or from short runs (with the first seed).

    Args:
        run: maps named recipes to their ``result.json``.
    """
    directory = store.sub("calibration")
    seed = base.compare.seeds[0]
    devices = plan.workers * plan.worker_gpus or 1
    speeds: dict[str, MeasuredSpeed] = {}
    for name, method in methods.items():
        recipes = [recipe_of(base, method.keys, seed=seed, train__steps=n) for n in (SHORT, LONG)]
        file = f"{digest(dump(recipes[0]), cpu_model(), plan.workers, plan.worker_gpus)}.json"
        if not directory.exists(file):
            short, long = run([(f"{name}, {r.train.steps} steps", r) for r in recipes])
            directory.write_json(file, asdict(speed(store, short, long, devices)))
        speeds[name] = MeasuredSpeed(**directory.read_json(file))
    return speeds


def speed(store: Store, short: dict[str, Any], long: dict[str, Any], devices: float) -> MeasuredSpeed:
    """Compute the speed from two results of one method, with `SHORT` and `LONG` steps.

    Training on labels alone may stop early; then the steps that were done count.
    """
    (few, first), (many, second) = (_trained(store, r) for r in (short, long))
    step = (second - first) / (many - few) if many > few and second > first else second / max(1, many)
    total = float(short["cost"]["without_cache"]["device_seconds"])
    return MeasuredSpeed(fixed=max(0.0, total - devices * few * step), step=devices * step)


def _trained(store: Store, result: dict[str, Any]) -> tuple[int, float]:
    """Return steps and seconds of the training loops of a result's pretraining.

    A run from scratch has no stage transfer: its training is in the ledger as finetuning.
    """
    rows = [s for s in result["stages"] if s["name"] == "transfer"]
    where = [("transfer", s["key"]) for s in rows]
    if not rows:
        where = [("scratch", s["key"]) for s in result["stages"] if s["name"] in ("finetune", "scratch")]
    manifests = [store.stage(name, key).manifest() or {} for name, key in where]
    # If a method has several phases, these share its steps.
    return sum(int(m["steps"]) for m in manifests), float(sum(m["seconds"] for m in manifests))
