"""How long a way takes on this cluster: the device time of its other stages, and of a step.

Two short runs a way. Their training loops differ in nothing but the steps, so the difference of their times is that of
the steps alone, without start-up, validation and checkpoints. What was measured is kept in the store: a restart, and
the next comparison on this store, take the same steps.
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
    """``fixed``: device-seconds of a run that do not grow with its steps; ``step``: those of one step."""

    fixed: float
    step: float

    def total(self, steps: int) -> float:
        return self.fixed + steps * self.step

    def within(self, seconds: float) -> int:
        """The most steps that take at most ``seconds``; 0 where not even one does."""
        return max(0, int((seconds - self.fixed) / self.step + 1e-9))


def measure(
    base: Recipe,
    methods: Methods,
    store: Store,
    plan: Allocation,
    run: Callable[[list[tuple[str, Recipe]]], list[dict[str, Any]]],
) -> dict[str, MeasuredSpeed]:
    """The speed of each way, from the store or by short runs (with the first seed).

    Args:
        run: named recipes -> their ``result.json``.
    """
    directory = store.sub("calibration")
    seed = base.compare.seeds[0]
    devices = plan.workers if plan.worker_gpus else 1
    speeds: dict[str, MeasuredSpeed] = {}
    for name, method in methods.items():
        recipes = [recipe_of(base, method.keys, seed=seed, train__steps=n) for n in (SHORT, LONG)]
        file = f"{digest(dump(recipes[0]), cpu_model(), plan.workers, plan.worker_gpus)}.json"
        if not directory.exists(file):
            short, long = run([(f"{name}, {r.train.steps} steps", r) for r in recipes])
            directory.write_json(file, asdict(speed(store, short, long, devices)))
        speeds[name] = MeasuredSpeed(**directory.read_json(file))
    return speeds


def speed(store: Store, short: dict[str, Any], long: dict[str, Any], devices: int) -> MeasuredSpeed:
    """The speed that two results of one way, with `SHORT` and `LONG` steps, tell.

    Training on labels alone may stop early; the steps that it took count then.
    """
    (few, first), (many, second) = (_trained(store, r) for r in (short, long))
    step = (second - first) / (many - few) if many > few and second > first else second / max(1, many)
    total = float(short["cost"]["without_cache"]["device_seconds"])
    return MeasuredSpeed(fixed=max(0.0, total - devices * few * step), step=devices * step)


def _trained(store: Store, result: dict[str, Any]) -> tuple[int, float]:
    """Steps and seconds of the loops of a result's pretraining; scratch is booked as finetuning without transfer."""
    rows = [s for s in result["stages"] if s["name"] == "transfer"]
    where = [("transfer", s["key"]) for s in rows]
    if not rows:
        where = [("scratch", s["key"]) for s in result["stages"] if s["name"] in ("finetune", "scratch")]
    manifests = [store.stage(name, key).manifest() or {} for name, key in where]
    # The phases of a way that has several share its steps.
    return sum(int(m["steps"]) for m in manifests), float(sum(m["seconds"] for m in manifests))
