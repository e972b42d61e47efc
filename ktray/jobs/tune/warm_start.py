"""Runs of earlier experiments in MLflow, from which a search learns before its first trial."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ktray.errors import KtrayError
from ktray.jobs.tune.space import Space
from ktray.recipe.schema import Recipe
from ktray.redact import scrub
from ktray.tracking.mlflow_server import prepare

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

MOST = 1000  # largest number of runs that are read, the newest first


def earlier_trials(uri: str, experiment: str, base: Recipe, space: Space, multi: bool) -> list[FrozenTrial]:
    """Return the finished runs on the same task that are within the space, as Optuna's trials.

    Args:
        uri: URI of the tracking server or database.
        experiment: name of the experiment.
        base: the baseline, resolved.
        multi: whether the search also minimises cost.

    Raises:
        KtrayError: the experiment does not exist, or the server is unreachable.
    """
    prepare(10.0)
    import optuna
    from mlflow import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri)
        entry = client.get_experiment_by_name(experiment)
        if entry is None:
            names = ", ".join(e.name for e in client.search_experiments(max_results=20))
            raise KtrayError(
                f"{scrub(uri)} has no experiment '{experiment}'", f"Set tune.warm_start to one of: {names}."
            )
        runs = client.search_runs([entry.experiment_id], "attributes.status = 'FINISHED'", max_results=MOST)
    except KtrayError:
        raise
    except Exception as error:
        reason = str(scrub(" ".join(str(error).split())))[:300]
        raise KtrayError(
            f"MLflow at {scrub(uri)} cannot be asked for the runs of '{experiment}': {reason}",
            "Check that the server runs, and mlflow.uri; or remove tune.warm_start.",
        ) from error
    trials = []
    for run in runs:
        point = point_of(run.data.params, run.data.metrics, base, space)
        if point is not None:
            params, validation, cost = point
            trials.append(
                optuna.trial.create_trial(
                    params=params,
                    distributions=space.distributions(params),
                    values=[validation, cost] if multi else [validation],
                )
            )
    return trials


def point_of(
    params: Mapping[str, str], metrics: Mapping[str, float], base: Recipe, space: Space
) -> tuple[dict[str, Any], float, float] | None:
    """Return the point of a logged run in the space, its validation metric and its cost; None if the run has another
    task or is outside the space."""
    values = {key: parse(text) for key, text in params.items()}
    validation = metrics.get(f"val.{base.task.metric}")
    cost = metrics.get(f"cost.without_cache_{base.tune.cost}")
    same = all(values.get(f"task.{key}") == getattr(base.task, key) for key in ("name", "data", "kind", "metric"))
    if validation is None or cost is None or not same:
        return None
    point = space.locate(values)
    return None if point is None else (point, validation, cost)


def parse(text: str) -> Any:
    """Convert a parameter to the value in the recipe, since MLflow stores only text."""
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    try:
        return json.loads(text)
    except ValueError:
        return text
