"""The view of cost against accuracy: what is drawn, and how MLflow gets it."""

import json
import shlex
import shutil

import pytest

from ktray.errors import KtrayError
from ktray.jobs import chart

FLOPS, USD, SECONDS = chart.COSTS


def run(accuracy="test.top1", **more):
    return {accuracy: 0.5, FLOPS: 1e12, SECONDS: 10.0, **more}


def test_the_axes_are_those_of_the_runs():
    stage = {"loss": 1.0, "cost.flops": 5.0}
    assert chart.axes([run(), stage]) == ([FLOPS, SECONDS], ["test.top1"])
    assert chart.axes([run(**{USD: 0.1}), run(**{USD: 0.2})])[0] == [FLOPS, USD]
    assert chart.axes([run(**{USD: 0.1}), run()])[0] == [FLOPS, SECONDS]  # one has no price
    two = [run("test.miou"), run("test.mean_class_accuracy"), run("test.miou", **{"val.miou": 0.4})]
    assert chart.axes(two)[1] == ["test.miou", "test.mean_class_accuracy"]
    assert chart.axes([run("val.top1")])[1] == ["val.top1"]  # trials leave the test split alone
    with pytest.raises(KtrayError, match="cost and an accuracy"):
        chart.axes([stage])
    with pytest.raises(KtrayError, match="cost and an accuracy"):
        chart.axes([])


def test_a_comparisons_view_has_its_runs_alone_by_way():
    everything = chart.view([FLOPS, USD], ["test.top1"])
    drawn = [(c["type"], c["xaxis"]["key"], c["yaxis"]["key"]) for c in everything["compareRunCharts"]]
    assert drawn == [("SCATTER", FLOPS, "test.top1"), ("SCATTER", USD, "test.top1")]
    sections = {s["uuid"] for s in everything["compareRunSections"]}
    assert {c["metricSectionId"] for c in everything["compareRunCharts"]} == sections
    assert (everything["orderByKey"], everything["orderByAsc"]) == ("metrics.`test.top1`", False)
    assert everything["groupBy"] is None
    one = chart.view([FLOPS], ["test.top1"], "20260101-compare")
    assert one["searchFilter"].endswith("tags.compare = '20260101-compare'")
    assert one["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "way"}]
    assert "test.top1" not in chart.view([FLOPS], ["test.top1", "test.miou"])["searchFilter"]


@pytest.mark.parametrize(
    ("uri", "server"),
    [
        ("https://me:secret@mlflow.example.com/ml/", "https://mlflow.example.com/ml/#/"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000/#/"),
    ],
)
def test_the_address_has_no_password(uri, server):
    found = chart.where_to_look(uri, "7", "ktray-a b")
    assert found == f"{server}experiments/7/runs?compareRunsMode=CHART&viewStateShareKey=ktray-a%20b"


def test_a_view_is_put_on_an_experiment(database, tmp_path, capsys):
    from mlflow import MlflowClient

    uri = f"sqlite:///{shutil.copy(database, tmp_path)}"
    client = MlflowClient(tracking_uri=uri)
    number = client.create_experiment("letters")
    command = ["letters", "--uri", uri]
    assert chart.main(command) == 2
    assert "no run" in capsys.readouterr().err.lower()
    for name, value in run().items():
        client.log_metric(client.create_run(number).info.run_id, name, value)  # no run has both
    assert chart.main(command) == 2
    whole = client.create_run(number).info.run_id
    for name, value in run().items():
        client.log_metric(whole, name, value)
    assert chart.main(command) == 0
    line = capsys.readouterr().out.strip()
    assert shlex.split(line.split(", then ")[0])[1:] == ["mlflow", "ui", "--backend-store-uri", uri]
    tags = client.get_experiment(number).tags
    assert json.loads(tags["mlflow.sharedViewState.ktray"]) == chart.view([FLOPS, SECONDS], ["test.top1"])
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert chart.main(["numbers", "--uri", uri]) == 2
    assert "letters" in capsys.readouterr().err


def test_no_comparison_is_lost_over_a_server_that_is_away(tmp_path):
    from ktray import recipe as recipes
    from ktray.jobs.compare import mlflow
    from ktray.storage.store import Store

    asked = recipes.load(None, ["mlflow.uri=http://127.0.0.1:9", "mlflow.experiment=letters"])
    told = mlflow.chart(asked, Store(str(tmp_path)), {"run_id": "c1"})
    assert told.startswith("MLflow has no chart (MLflow at http://127.0.0.1:9 did not save the chart: ")
    assert told.endswith("to retry: python -m ktray.jobs.chart letters")
    assert "\n" not in told
