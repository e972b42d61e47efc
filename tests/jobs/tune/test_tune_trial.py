from ktray import recipe as recipes
from ktray.jobs.tune.budget import CostRate, SearchBudget, limits
from ktray.jobs.tune.records import BASELINE, Records
from ktray.jobs.tune.trial import TrialRunner
from ktray.recipe.tune import BudgetConfig
from ktray.storage.store import Dir


class Planned(TrialRunner):
    """FLOPs of a plan by a formula: one for a step, 50 for all else."""

    def _stages(self, recipe):
        return {"teach": 50.0, "transfer": float(recipe.train.steps)}

    def fit(self, record):
        self._plans[record.number] = self._stages(recipes.override(self.base, record.keys))
        self._fit(record)


def rungs(folder, limit=1.0):
    base = recipes.override(recipes.Recipe(), {"train.steps": 100, "tune.cost_limit": limit})
    records = Records(Dir(str(folder)))
    records.begin({}, {})
    budget = SearchBudget(limits(BudgetConfig(flops=1e6)), CostRate(1.0), hourly=1.0)
    return Planned(base, None, None, budget, records, "search")


def test_a_trial_that_would_cost_more_than_the_baseline_gets_fewer_steps_whichever_is_planned_first(tmp_path):
    for name, order in (("given", (BASELINE, 1)), ("trial", (1, BASELINE))):
        one = rungs(tmp_path / name)
        one.records.begin({}, {"train.steps": 300})
        for number in order:
            one.fit(one.records.trials[number])
        assert one.records.trials[1].keys["train.steps"] == 100
        assert [one.records.trials[n].flops for n in (BASELINE, 1)] == [150.0, 150.0]


def test_the_baseline_keeps_its_steps_where_the_winner_must_be_cheaper(tmp_path):
    one = rungs(tmp_path, limit=0.8)
    one.records.begin({}, {"train.steps": 100})
    for _ in range(2):  # as a search that goes on plans it again
        one.fit(one.records.trials[BASELINE])
    one.fit(one.records.trials[1])
    assert one.records.trials[BASELINE].keys == {}
    assert one.records.trials[1].keys["train.steps"] == 70
