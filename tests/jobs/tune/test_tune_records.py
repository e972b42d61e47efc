"""What is remembered of trials, the Pareto set and the best, against brute force."""

import numpy as np
import pytest

from ktray.errors import KtrayError
from ktray.jobs.tune.records import (
    BASELINE,
    OPEN,
    OVER_BUDGET,
    OVER_COST_LIMIT,
    STATES,
    Records,
    TrialPoint,
)
from ktray.storage.store import Dir


def point(trial, rung, cost, validation):
    whole = {"flops": cost, "device_seconds": 1.0, "usd": None}
    return TrialPoint(
        trial, rung, 1.0, 100, f"run-{trial}-{rung}", validation, cost, whole, {"transfer": cost}, cost, {}, 1.0
    )


@pytest.fixture
def records(tmp_path):
    rng = np.random.default_rng(0)
    found = Records(Dir(str(tmp_path)))
    for number in range(30):
        record = found.begin({"train.lr": 0.1}, {"train.lr": 0.1})
        for rung in range(int(rng.integers(1, 3))):
            # Few values, so that there are ties.
            record.points.append(point(number, rung, float(rng.integers(1, 12)), float(rng.integers(1, 9)) / 10))
        found.close(record, "finished")
    return found


def test_the_front_is_what_nobody_beats(records):
    points = list(records.points())

    def beaten(p):
        return any(
            q.cost <= p.cost and q.validation >= p.validation and (q.cost, q.validation) != (p.cost, p.validation)
            for q in points
        )

    expected = {(p.cost, p.validation) for p in points if not beaten(p)}
    assert {(p.cost, p.validation) for p in records.front()} == expected
    assert len(records.front()) == len(expected), "of equals one stands for all"


def test_the_best_costs_no_more_than_it_may(records):
    given = records.baseline()
    for limit in (0.5, 1.0, 1.5, None):
        fits = [p for p in records.points() if limit is None or p.cost <= limit * given.cost]
        best = records.best(limit)
        if not fits:
            assert best is None
            continue
        top = max(p.validation for p in fits)
        assert (best.validation, best.cost) == (top, min(p.cost for p in fits if p.validation == top))


def test_another_process_reads_the_same(records):
    again = Records(records.folder)
    again.load()
    assert again.in_order() == records.in_order()
    assert again.begin({}, {}).number == 30


def test_who_could_not_be_paid_goes_on_when_there_is_more(records):
    records.close(records.trials[3], OVER_BUDGET, "planned 1, left 0")
    records.reopen()
    assert [r.number for r in records.in_order() if r.state == OPEN] == [3]
    assert records.trials[BASELINE].state == "finished"


def test_states_have_their_current_names(records):
    for number, state in enumerate(("unpaid", "dear", *STATES)):
        records.close(records.trials[number], state)
    again = Records(records.folder)
    again.load()
    assert [again.trials[number].state for number in range(8)] == [OVER_BUDGET, OVER_COST_LIMIT, *STATES]


def test_a_state_of_a_newer_version_is_refused(records):
    records.close(records.trials[3], "postponed")
    with pytest.raises(KtrayError, match="the unknown state 'postponed'"):
        Records(records.folder).load()
