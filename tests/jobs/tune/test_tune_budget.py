"""The budget: nothing begins that does not fit, nothing goes beyond its allowance, everything is charged once."""

from types import SimpleNamespace

import pytest

from ktray.accounting.attempts import DirLog, Entry
from ktray.accounting.ledger import Ledger
from ktray.accounting.speeds import Measured, Speeds
from ktray.errors import KtrayError
from ktray.jobs.tune.budget import RECORD_SECONDS, BudgetExceeded, CostRate, SearchBudget, amounts, limits
from ktray.jobs.tune.run import keep_for_the_winner, planned_rate
from ktray.pipeline.estimate import PlannedDevice
from ktray.pipeline.plan_stages import Line
from ktray.pipeline.plan_work import PlannedWork
from ktray.recipe.tune import BudgetConfig
from ktray.storage.store import Store

CPU = {"cores": 2, "gpus": [], "instance": None}


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def search_budget(clock=None, hourly=1.0, parallel=1, **given):
    return SearchBudget(limits(BudgetConfig(**given)), CostRate(1e9), parallel, hourly, clock=clock or Clock())


def entry(flops=0, seconds=0.0, run="a", stage="transfer", **more):
    return Entry(stage, "k", 1, run, flops=flops, wall_seconds=seconds, device_seconds=seconds,
                 usd=seconds / 3600, **more)  # fmt: skip


def test_units_of_the_recipe():
    assert limits(BudgetConfig()) == {"wall": 900.0}
    assert limits(BudgetConfig(device_hours=2, usd=3)) == {"usd": 3.0, "device_seconds": 7200.0}
    with pytest.raises(KtrayError, match="no price"):
        search_budget(hourly=None, usd=1)


def test_what_a_run_spent_leaves_out_baselines():
    assert amounts([entry(5, 2.0), entry(7, 1.0, stage="labels"), entry(100, 9.0, stage="scratch")]) == {
        "flops": 12.0,
        "device_seconds": 3.0,
        "usd": pytest.approx(3 / 3600),
    }


def test_what_does_not_fit_is_not_begun_and_promises_add_up():
    budget = search_budget(flops=100.0)
    assert budget.promise("a", {"transfer": 50.0}) == ""
    assert budget.promised["a"] == {"flops": 75.0}
    assert "planned 50 FLOP, left 25 FLOP" in budget.promise("b", {"transfer": 50.0})
    budget.settle("a", [entry(40, 10.0)], "a", 12.0)
    assert budget.left() == {"flops": 60.0}
    budget.reserve = {"flops": 30.0}
    assert budget.promise("b", {"transfer": 31.0})
    assert budget.promise("b", {"transfer": 24.0}), "in the moments that stopping takes it would go beyond"
    assert budget.promise("b", {"transfer": 20.0}) == ""
    assert budget.promised["b"] == {"flops": 30.0}


def test_a_run_is_stopped_before_its_allowance_is_spent():
    budget = search_budget(flops=100e9)
    assert budget.promise("a", {"transfer": 20e9}) == ""
    budget.watch("a", [entry(20e9, 20.0)], "a")  # a GFLOP a second: four more until the next look
    with pytest.raises(BudgetExceeded, match="of its allowance of 30 GFLOP"):
        budget.watch("a", [entry(26.5e9, 26.5)], "a")


def test_a_run_within_its_plan_is_not_stopped_however_fast_it_begins():
    budget = search_budget(flops=100e9)
    assert budget.promise("a", {"transfer": 20e9}) == ""
    budget.watch("a", [entry(19e9, 1.0)], "a")
    with pytest.raises(BudgetExceeded):
        budget.watch("a", [entry(21e9, 1.0)], "a")


def test_time_ends_trials_before_the_winner():
    clock = Clock()
    budget = search_budget(clock, wall=10.0)
    budget.reserve = {"wall": 200.0}
    assert budget.promise("a", {"transfer": 1e9}) == ""
    clock.now += 600 - 24 - 200 - 1
    budget.watch("a", [entry()], "a")
    clock.now += 2
    with pytest.raises(BudgetExceeded, match="at the limit of its time"):
        budget.watch("a", [entry()], "a")
    budget.watch("winner", [entry()], "w", final=True)
    clock.now += 200
    with pytest.raises(BudgetExceeded):
        budget.watch("winner", [entry()], "w", final=True)
    assert budget.elapsed < 600


def test_a_stage_that_two_runs_need_is_charged_to_the_one_that_made_it(tmp_path):
    log = DirLog(Store(str(tmp_path)).stage("teach", "k"))
    first, second = Ledger(CPU, "first"), Ledger(CPU, "second")
    with first.attempt(log, "teach", "k") as meter:
        meter.add(flops=70)
        assert [e.flops for e in first.spent()] == [70], "what still goes on counts"
    second.reuse(log, "teach", "k")
    with second.attempt(DirLog(Store(str(tmp_path)).stage("transfer", "t")), "transfer", "t") as meter:
        meter.add(flops=7)
    budget = search_budget(flops=100.0)
    budget.settle("1", first.spent(), "first", 1.0)
    budget.settle("2", second.spent(), "second", 1.0)
    assert budget.spent()["flops"] == 77


def test_a_run_that_is_gone_on_with_is_not_charged_twice():
    budget = search_budget(flops=100.0)
    budget.settle("a", [entry(30, state="running")], "a")
    budget.settle("a", [entry(30, state="running"), Entry("transfer", "k", 2, "a", flops=20)], "a", 1.0)
    assert budget.spent()["flops"] == 50


def test_what_was_kept_is_gone_on_with():
    clock, kept = Clock(), []
    budget = search_budget(clock, wall=10.0)
    budget.keep = kept.append
    budget.promise("0/0", {"transfer": 1e9})
    budget.watch("0/0", [entry(5)], "run-0")
    budget.settle("0/0", [entry(5, 1.0)], "run-0", 2.0)
    budget.promise("1/0", {"transfer": 1e9})
    budget.watch("1/0", [entry(6)], "run-1")
    clock.now += 50
    budget.record()
    again = search_budget(Clock(), wall=10.0)
    assert again.load(kept[-1]) == ["run-1"]
    assert again.elapsed == 50 + RECORD_SECONDS
    assert again.spent()["flops"] == 5
    assert again.speed.seen == budget.speed.seen
    assert not again.grown
    more = search_budget(Clock(), wall=20.0)
    more.load(kept[-1])
    assert more.grown


def test_time_is_learned_by_stage():
    speed = CostRate(1e9)
    assert speed.cost({"transfer": 1e9})[0] == pytest.approx(5 + 5 + 1)
    for flops in (1e9, 2e9, 5e9):  # 3 s and 2 s a GFLOP; 4 s beside
        seconds = 3 + 2 * flops / 1e9
        speed.learn([entry(flops, seconds)], seconds + 4)
    wall, device = speed.cost({"transfer": 10e9})
    assert device == pytest.approx(23, rel=0.01)
    assert wall == pytest.approx(27, rel=0.01)
    assert speed.cost({"transfer": 10e9, "teach": 1e9})[1] == pytest.approx(23 + 6, rel=0.01)


def test_each_stage_starts_with_the_speed_of_its_plan(tmp_path):
    lines = [Line("teach", 8e9, 0, "", images=100), Line("transfer", 4e9, 0, "", images=10), Line("labels", 0, 0, "")]
    facts = {"stage": "teach", "model": "toy", "size": 32}
    speeds = Speeds(Store(str(tmp_path)).sub("speeds"))
    speeds.record({**facts, "device": "some CPU"}, Measured(100, 2.0), "20260101-000000")
    work = PlannedWork(lines, {}, {"teach": facts}, speeds)
    speed = planned_rate(work, PlannedDevice("some CPU", False, 2, None), at_once=2)
    # 4 GFLOP/s in TEACH, which was measured, and 60 in TRANSFER on two cores; each of two runs has a half.
    assert speed.rates == {"teach": pytest.approx(2e9), "transfer": pytest.approx(30e9)}
    assert speed.rate == pytest.approx(12e9 / (2.0 + 4 / 60) / 2)
    assert speed.cost({"teach": 4e9})[1] == pytest.approx(5 + 2)
    assert speed.cost({"transfer": 30e9})[1] == pytest.approx(5 + 1)


@pytest.mark.parametrize(("parallel", "turns"), [(1, 2), (2, 1)])
def test_what_the_winner_needs_is_kept_with_time_to_spare(parallel, turns):
    base = SimpleNamespace(tune=SimpleNamespace(cost_limit=1.0, seeds=3))
    best = SimpleNamespace(own={"transfer": 50e9})
    own, test = {"transfer": 90e9}, {"evaluate": 5e9}
    budget = search_budget(parallel=parallel, wall=10.0, flops=1e12)
    # At 1 GFLOP/s, with 5 s for each stage and 5 s beside them. The first seed is trained already, the others are not.
    keep_for_the_winner(budget, SimpleNamespace(best=lambda limit: best), base, own, test)
    assert budget.reserve == {"wall": pytest.approx(15 + 1.2 * turns * 70), "flops": pytest.approx(5e9 + 2 * 55e9)}
    # Nothing is trained yet: all seeds of the baseline, but never more than half of the budget.
    keep_for_the_winner(budget, SimpleNamespace(best=lambda limit: None), base, own, test)
    assert budget.reserve == {
        "wall": pytest.approx(min(300, 110 + 1.2 * turns * 110)),
        "flops": pytest.approx(3 * 95e9),
    }
