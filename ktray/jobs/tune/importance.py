"""How much each key matters for validation, by functional ANOVA (Hutter et al., ICML 2014, as Optuna has it).

Every run counts, also those that were stopped early: the share of its steps is a parameter like the others, which takes
the blame for what fewer steps cost. A key that does not count for a trial has a value of its own there.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from ktray.jobs.tune.records import Records
from ktray.jobs.tune.space import Space, Spec, values_of

SHARE = "share of the steps"
ABSENT = "(does not count)"
LEAST = 6  # runs, below which a forest says nothing
TRANSFER = ("transfer", "teach", "gallery")  # sections that say which images are learned from, and in what views


def importance(space: Space, records: Records, seed: int = 0) -> dict[str, float]:
    """By key, the share of the variance of validation that it explains; they add up to 1. Empty where there are too few
    runs, or all are alike."""
    import optuna

    rows: list[tuple[dict[str, Any], float]] = []
    for record in records.in_order():
        params = record.params if record.params else space.locate(values_of(space.base))
        if params is not None:
            rows += [({**params, SHARE: p.share}, p.validation) for p in record.points]
    if len(rows) < LEAST or len({value for _, value in rows}) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    distributions: dict[str, Any] = {spec.key: _whole(spec, rows) for spec in space.specs}
    shares = sorted({params[SHARE] for params, _ in rows})
    distributions[SHARE] = optuna.distributions.CategoricalDistribution(shares)
    specs = {spec.key: spec for spec in space.specs}
    for params, value in rows:
        full = {key: params.get(key, _absent(specs[key])) if key in specs else params[key] for key in distributions}
        study.add_trial(optuna.trial.create_trial(params=full, distributions=distributions, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares_of = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=seed)
        )
    return {key: float(value) for key, value in shares_of.items() if math.isfinite(value)}


def of_transfer_set(importances: dict[str, float]) -> float:
    """What the choices of the transfer set matter together."""
    return sum(value for key, value in importances.items() if key.split(".")[0] in TRANSFER)


def _whole(spec: Spec, rows: list[tuple[dict[str, Any], float]]) -> Any:
    from optuna.distributions import CategoricalDistribution

    if spec.choices and any(spec.key not in params for params, _ in rows):
        return CategoricalDistribution([*spec.labels, ABSENT])
    return spec.distribution


def _absent(spec: Spec) -> Any:
    """The value of a key where it does not count: a choice of its own, or the middle of a range."""
    if spec.choices:
        return ABSENT
    middle = math.sqrt(spec.low * spec.high) if spec.log else (spec.low + spec.high) / 2
    if spec.step is not None:
        middle = spec.low + spec.step * round((middle - spec.low) / spec.step)
    return round(middle) if spec.whole else middle
