"""The importance of each key for validation, by functional ANOVA (Hutter et al., ICML 2014, Optuna's implementation).

Every run counts, also runs that were stopped early: the share of the steps is a parameter like the others, and explains
the effect of fewer steps. If a key does not apply to a trial, it has a special value there.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from ktray.jobs.tune.records import Records
from ktray.jobs.tune.space import Space, Spec, values_of

SHARE = "share of the steps"
ABSENT = "(does not apply)"
LEAST = 6  # smallest number of runs for which a forest is informative
TRANSFER = ("transfer", "teach", "gallery")  # sections that determine the images of the transfer set and their views


def importance(space: Space, records: Records, seed: int = 0) -> dict[str, float]:
    """Return the share of the variance of validation that each key explains, by key; the shares add up to 1.

    The result is empty if there are too few runs or if all have the same validation metric.
    """
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
    """Return the total importance of the choices of the transfer set."""
    return sum(value for key, value in importances.items() if key.split(".")[0] in TRANSFER)


def _whole(spec: Spec, rows: list[tuple[dict[str, Any], float]]) -> Any:
    from optuna.distributions import CategoricalDistribution

    if spec.choices and any(spec.key not in params for params, _ in rows):
        return CategoricalDistribution([*spec.labels, ABSENT])
    return spec.distribution


def _absent(spec: Spec) -> Any:
    """Return the value of a key that does not apply to a trial: a special choice, or the middle of a range."""
    if spec.choices:
        return ABSENT
    middle = math.sqrt(spec.low * spec.high) if spec.log else (spec.low + spec.high) / 2
    if spec.step is not None:
        middle = spec.low + spec.step * round((middle - spec.low) / spec.step)
    return round(middle) if spec.whole else middle
