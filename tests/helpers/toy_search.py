"""Trials that take a formula for a pipeline; `python toy_search.py FOLDER CPUS ...` runs some on Rays of its own."""

import math
import sys
import threading

from ktray import recipe as recipes
from ktray.jobs.tune import engine
from ktray.jobs.tune.budget import CostRate, SearchBudget, limits
from ktray.jobs.tune.records import BASELINE, OVER_BUDGET, Records, TrialPoint
from ktray.jobs.tune.space import read
from ktray.recipe.schema import Recipe
from ktray.recipe.tune import BudgetConfig, TuneConfig
from ktray.storage.store import Dir

SPACE = {"train.lr": {"low": 0.001, "high": 1.0, "log": True}, "train.batch_size": [16, 32, 64]}
BASE = recipes.override(Recipe(), {"train.steps": 90, "train.batch_size": 32, "train.lr": 0.5, "transfer.size": 50})


class Toy:
    """The best learning rate is 0.03; small batches are cheaper. ``work`` does what a pipeline would on the cluster."""

    def __init__(self, folder, work=lambda: None, space=SPACE, limit=1e6, **part):
        self.part = TuneConfig(space=space, **part)
        self.space = read(BASE, space)
        self.records = Records(Dir(str(folder)))
        self.records.load()
        self.budget = SearchBudget(limits(BudgetConfig(flops=limit)), CostRate(1.0), hourly=1.0)
        self.work, self.asked = work, []
        self.lock = threading.Lock()
        self.most = self.now = 0
        self.bad = {}

    def shares(self, number):
        return [1.0] if number == BASELINE else self.part.rungs

    def answer(self, number, rung):
        record = self.records.trials[number]
        share = self.shares(number)[rung]
        with self.lock:
            self.asked.append((number, rung))
            self.now += 1
            self.most = max(self.most, self.now)
        self.work()
        with self.lock:
            self.now -= 1
        keys = {"train.lr": BASE.train.lr, "train.batch_size": BASE.train.batch_size, **self.space.keys(record.params)}
        cost = share * keys["train.batch_size"]
        if number in self.bad or self.budget.promise(str(number), {"transfer": cost}):
            state, reason = self.bad.get(number, (OVER_BUDGET, "planned more than is left"))
            self.records.close(record, state, reason)
            return {"validation": math.nan, "cost": math.nan, "full_cost": math.nan, "done": True, "ended": state}
        self.budget.promised.clear()
        self.budget.charged[f"{number}-{rung}"] = {"flops": cost, "device_seconds": cost, "usd": 0.0}
        value = share * math.exp(-abs(math.log(keys["train.lr"] / 0.03)) / 3)
        before = record.points[-1].resource if record.points else 0.0
        point = TrialPoint(number, rung, share, 1, f"{number}-{rung}", value, cost, {"flops": cost}, {"transfer": cost},
                      before + cost, {"flops": cost}, 0.0)  # fmt: skip
        record.points.append(point)
        self.records.keep(record)
        last = rung == len(self.shares(number)) - 1
        return {"validation": value, "cost": point.resource, "full_cost": keys["train.batch_size"], "done": last,
                "ended": "", "baseline": number == BASELINE}  # fmt: skip

    def run(self, at_once=2, former=()):
        first = self.part.rungs[0] * BASE.train.batch_size
        engine.run(
            self.part, self.space, self.records, self.budget, self.answer, at_once, first, lambda record: None, former
        )
        return self.records.in_order()


def busy():
    """All of one CPU of the cluster for a moment, as a pipeline's stages take it."""
    import ray

    @ray.remote(num_cpus=1)
    def work():
        return 1

    ray.get(work.remote(), timeout=60)


if __name__ == "__main__":
    import ray

    for count in map(int, sys.argv[2:]):
        ray.init(num_cpus=count, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        trials = Toy(f"{sys.argv[1]}/{count}", busy, trials=4, rungs=[0.5, 1.0]).run(at_once=count)
        print("ended", [t.state for t in trials])
        ray.shutdown()
