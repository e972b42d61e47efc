"""Ray Tune and Optuna as ktray uses them, with a formula for the pipeline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_search import Toy, busy

from ktray.jobs.tune.engine import study_trial
from ktray.jobs.tune.records import BASELINE, OPEN, OVER_BUDGET

TOY = Path(__file__).parents[2] / "helpers" / "toy_search.py"


def test_the_baseline_runs_to_its_end_weak_trials_are_stopped_and_failed_ones_marked(cluster, tmp_path):
    toy = Toy(tmp_path, busy, trials=14, rungs=[1 / 9, 1 / 3, 1.0])
    toy.bad = {4: ("failed", "the loss is nan at step 4"), 5: ("failed", "out of memory")}
    trials = toy.run()
    assert len(trials) == 14
    assert [t.number for t in trials if t.state == "failed"] == [4, 5]
    assert Toy(tmp_path).records.trials[5].reason == "out of memory"
    assert [asked for asked in toy.asked if asked[0] == BASELINE] == [(BASELINE, 0)]
    assert trials[BASELINE].state == "finished"
    assert [p.share for p in trials[BASELINE].points] == [1.0]
    stopped = [t for t in trials if t.state == "stopped"]
    finished = [t for t in trials if t.state == "finished"]
    assert stopped
    assert {t.state for t in trials} == {"stopped", "finished", "failed"}
    assert all(len(t.points) < 3 for t in stopped)
    assert toy.most <= 2
    best = max(finished, key=lambda t: t.last.validation)
    assert best.last.validation > trials[BASELINE].last.validation


def test_nothing_begins_that_cannot_be_paid_and_then_the_search_ends(cluster, tmp_path):
    toy = Toy(tmp_path, limit=200.0, rungs=[0.5, 1.0], search="random")
    trials = toy.run(at_once=1)
    assert 0.5 * 200 < toy.budget.spent()["flops"] <= 200
    assert {t.state for t in trials} <= {"finished", "stopped", OVER_BUDGET}


def test_an_interrupted_search_goes_on_with_the_same_trials(cluster, tmp_path):
    first = Toy(tmp_path, trials=5, rungs=[0.5, 1.0], search="random", seed=3)
    whole = first.run(at_once=1)
    torn = first.records.trials[3]
    del torn.points[1:]  # killed in its second rung
    first.records.close(torn, OPEN)
    again = Toy(tmp_path, trials=8, rungs=[0.5, 1.0], search="random", seed=3)
    trials = again.run(at_once=1)
    assert len(trials) == 8
    assert {number for number, _ in again.asked} == {3, 5, 6, 7}, "trials that have ended are not run again"
    assert trials[3].state in ("finished", "stopped")
    assert [t.params for t in trials[:5]] == [t.params for t in whole]
    assert len({str(t.params) for t in trials[1:]}) == 7, "new trials are new"


def test_a_grid_is_gone_through_once(cluster, tmp_path):
    space = {"train.lr": [0.01, 0.03, 0.1], "train.batch_size": [16, 32]}
    trials = Toy(tmp_path, space=space, search="grid", rungs=[1.0]).run()
    assert len(trials) == 1 + 6
    drawn = {(t.params["train.lr"], t.params["train.batch_size"]) for t in trials[1:]}
    assert drawn == {(lr, size) for lr in (0.01, 0.03, 0.1) for size in (16, 32)}


def test_two_aims_know_the_cost_and_former_trials_teach(cluster, tmp_path):
    first = Toy(tmp_path / "first", trials=6, rungs=[1.0], search="random").run()
    space = Toy(tmp_path / "space").space
    former = [t for r in first if (t := study_trial(space, r, ["validation", "full_cost"]))]
    assert len(former) == 6, "the baseline is in the space too"
    assert all(t.values[1] in (16, 32, 64) for t in former)
    trials = Toy(tmp_path / "second", trials=6, rungs=[1.0], search="nsga2").run(former=former)
    assert [t.state for t in trials] == ["finished"] * 6


@pytest.mark.long
def test_it_does_not_hang_where_the_cluster_has_one_cpu(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_TRAIN_V2_ENABLED": "1"}
    command = [sys.executable, str(TOY), str(tmp_path), "1"]  # the session's has two
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("finished") + done.stdout.count("stopped") == 4
