"""Runs of former experiments in MLflow, as points of the space."""

import shutil

import pytest

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.jobs.tune.space import read
from ktray.jobs.tune.warm_start import earlier_trials, parse, point_of
from ktray.pipeline.run import logged_params
from ktray.recipe.schema import Recipe

BASE = recipes.override(
    Recipe(),
    {
        "task.name": "letters",
        "task.metric": "top1",
        "train.steps": 100,
        "train.lr": 1e-05,
        "baselines.scratch": True,
        "student.name": "test_resnet",
        "student.kwargs": {"output_stride": 8},
    },
)
SPACE = read(
    BASE,
    {
        "train.lr": {"low": 1e-6, "high": 1e-4, "log": True},
        "transfer.repeat_similarity": [None, 0.95],
        "student": [{"name": "test_resnet", "kwargs": {"output_stride": 8}}, {"name": "test_vit", "kwargs": {}}],
        "baselines.scratch": [True, False],
    },
)


def logged(recipe):
    """The parameters of its run, as the pipeline logs them and MLflow gives them back."""
    return {k: str(v) for k, v in logged_params(recipe).items()}


def test_a_parameter_is_read_as_it_was():
    values = [True, False, 3, 1e-05, 0.5, "query_balanced", "s3://a/b"]
    assert [parse(str(v)) for v in values] == values
    assert parse('{"output_stride": 8}') == {"output_stride": 8}


def test_a_run_lies_where_its_recipe_does():
    metrics = {"val.top1": 0.8, "cost.without_cache_flops": 5e12}
    keys = {"train.lr": 3e-05, "transfer.repeat_similarity": None, "student.name": "test_vit", "student.kwargs": {}}
    params, validation, cost = point_of(logged(recipes.override(BASE, keys)), metrics, BASE, SPACE)
    assert params["train.lr"] == 3e-05
    assert SPACE.keys(params) == {**keys, "baselines.scratch": True}
    assert (validation, cost) == (0.8, 5e12)


@pytest.mark.parametrize(
    ("keys", "metrics"),
    [
        ({"train.lr": 0.5}, {"val.top1": 0.8, "cost.without_cache_flops": 1.0}),
        ({"task.name": "digits"}, {"val.top1": 0.8, "cost.without_cache_flops": 1.0}),
        ({}, {"val.miou": 0.8, "cost.without_cache_flops": 1.0}),
        ({}, {"val.top1": 0.8}),
    ],
)
def test_another_task_or_space_teaches_nothing(keys, metrics):
    assert point_of(logged(recipes.override(BASE, keys)), metrics, BASE, SPACE) is None


def test_from_mlflow(database, tmp_path):
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    shutil.copy(database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("before", artifact_location=(tmp_path / "artifacts").as_uri())
    for lr, status in ((3e-05, "FINISHED"), (2e-05, "FAILED"), (0.5, "FINISHED")):
        run = client.create_run(experiment).info.run_id
        params = [Param(k, v) for k, v in logged(recipes.override(BASE, {"train.lr": lr})).items()]
        client.log_batch(run, [Metric("val.top1", 0.7, 0, 0), Metric("cost.without_cache_flops", 9.0, 0, 0)])
        for at in range(0, len(params), 100):  # MLflow takes no more at once
            client.log_batch(run, params=params[at : at + 100])
        client.set_terminated(run, status)
    (trial,) = earlier_trials(uri, "before", BASE, SPACE, multi=True)
    assert trial.params["train.lr"] == 3e-05
    assert trial.values == [0.7, 9.0]
    with pytest.raises(KtrayError, match="has no experiment 'behind'"):
        earlier_trials(uri, "behind", BASE, SPACE, multi=False)
