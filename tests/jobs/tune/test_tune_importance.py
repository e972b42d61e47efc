"""Importance of keys, against the exact decomposition of the variance on a full grid."""

import numpy as np
import pytest

from ktray import recipe as recipes
from ktray.jobs.tune.importance import SHARE, importance, of_transfer_set
from ktray.jobs.tune.records import Records, TrialPoint
from ktray.jobs.tune.space import read
from ktray.recipe.schema import Recipe
from ktray.storage.store import Dir

BASE = recipes.override(Recipe(), {"train.steps": 100, "train.batch_size": 32, "transfer.size": 50})
GIVEN = {"transfer.size": [50, 100, 200], "train.ema": [0.0, 0.9, 0.99], "train.batch_size": [16, 32]}
EFFECT = {
    "transfer.size": {50: 0.0, 100: 0.2, 200: 0.3},
    "train.ema": {0.0: 0.05, 0.9: 0.0, 0.99: 0.12},
    "train.batch_size": {16: 0.0, 32: 0.0},
}


def searched(folder, points, value):
    records = Records(Dir(str(folder)))
    for params in points:
        record = records.begin(params, params)
        for rung, share in enumerate((0.5, 1.0)):
            run, result = f"{record.number}-{rung}", value(params, share)
            record.points.append(TrialPoint(record.number, rung, share, 1, run, result, 1.0, {}, {}, 1.0, {}, 1.0))
    return records


def test_shares_are_those_of_the_variance(tmp_path):
    space = read(BASE, GIVEN)
    records = searched(tmp_path, space.grid(), lambda p, share: sum(EFFECT[k][v] for k, v in p.items()) + 0.1 * share)
    found = importance(space, records)
    exact = {key: float(np.var(list(effect.values()))) for key, effect in EFFECT.items()} | {
        SHARE: float(np.var([0.05, 0.1]))
    }
    total = sum(exact.values())
    assert sum(found.values()) == pytest.approx(1)
    for key, variance in exact.items():
        assert found[key] == pytest.approx(variance / total, abs=0.08)
    assert next(iter(found)) == "transfer.size"
    assert of_transfer_set(found) == found["transfer.size"]


def test_a_key_that_does_not_always_count_is_weighed_too(tmp_path):
    given = {
        "objective.name": ["oriented", "dual"],
        "objective.label_weight": {"choices": [0.25, 0.75], "when": {"objective.name": ["dual"]}},
    }
    space = read(BASE, given)
    weight = {None: 0.5, 0.25: 0.1, 0.75: 0.9}
    records = searched(tmp_path, 2 * space.grid(), lambda p, share: weight[p.get("objective.label_weight")])
    assert importance(space, records)["objective.label_weight"] > 0.5


def test_too_few_or_equal_runs_say_nothing(tmp_path):
    space = read(BASE, GIVEN)
    assert importance(space, searched(tmp_path / "a", space.grid()[:2], lambda p, share: share)) == {}
    assert importance(space, searched(tmp_path / "b", space.grid(), lambda p, share: 0.5)) == {}
