"""The model in MLflow scores image bytes, is registered once, and a server that is away is told."""

import ast
import base64
import json
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from heard import heard
from mlflow import MlflowClient

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.jobs.export import predict, registry
from ktray.jobs.export.run_source import find
from ktray.pipeline.finished_run import FinishedRun

FOUND: dict[str, Any] = {
    "key": "0123456789abcdef",
    "time": 1.75e9,
    "run_id": "a run",
    "student": {"name": "test_resnet"},
    "files": {"student.onnx": {"bytes": 1000}},
    "metric": {"val": {"pytorch": {"metric": 0.9}, "onnx": {"metric": 0.9}}},
    "latency": {
        "models": {name: {"rows": [{"batch": 1, "threads": 1, "median_ms": 2.5}]} for name in ("pytorch", "onnx")}
    },
}


@pytest.fixture
def folder(onnx_file: Path, tmp_path: Path) -> Path:
    place = tmp_path / "export"
    place.mkdir()
    (place / "student.onnx").write_bytes(onnx_file.read_bytes())
    (place / "predict.py").write_bytes(Path(predict.__file__).read_bytes())
    (place / "README.md").write_text("card")
    (place / "export.json").write_text("{}")
    return place


def source(run: Path, *overrides: str) -> FinishedRun:
    return find(recipes.load(None, [f"store={run.parents[1]}", f"export.run={run.name}", *overrides]))


def test_registered_once_and_it_scores_bytes(
    run: Path, folder: Path, student, stripes: Path, tmp_path: Path, monkeypatch
) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{run.parents[1]}/mlflow.db")
    experiment = client.create_experiment("exp", artifact_location=(tmp_path / "artifacts").as_uri())
    result = json.loads((run / "result.json").read_text())
    result["mlflow"]["run_id"] = client.create_run(experiment).info.run_id
    (run / "result.json").write_text(json.dumps(result))
    lines: list[str] = []
    part = ("export.register_as=stripes", "export.alias=best")
    logged = heard(lines, registry.log, source(run, *part), folder, FOUND)
    assert logged["version"] == "1"
    assert heard(lines, registry.log, source(run, *part), folder, FOUND) == logged
    assert heard(lines, registry.log, source(run), folder, FOUND) == {"model_uri": logged["model_uri"]}
    version = client.get_model_version_by_alias("stripes", "best")
    assert (str(version.version), version.tags["ktray.run"]) == ("1", "a run")
    assert lines[0].endswith("models:/stripes@best is version 1")
    data = client.get_run(result["mlflow"]["run_id"])
    assert data.data.metrics["export.onnx.median_ms_batch1_threads1"] == 2.5
    assert data.outputs.model_outputs[0].model_id in logged["model_uri"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run.parents[1]}/mlflow.db")
    files = client.list_artifacts(data.info.run_id, "export_files")
    assert [file.path for file in files] == ["export_files/README.md", "export_files/export.json"]

    model = mlflow.pyfunc.load_model("models:/stripes@best")
    images = [path.read_bytes() for path in sorted((stripes / "test").glob("*/*"))[::7]]
    expected = [p.label for p in student.predict(images)]
    scored = model.predict(pd.DataFrame({"image": images}))
    assert scored["label"].tolist() == expected
    assert scored["probabilities"][0] == pytest.approx(student.predict(images[:1])[0].probabilities, abs=1e-5)
    with pytest.raises(ValueError, match="not a usable image"):
        model.predict(pd.DataFrame({"image": [b"nothing"]}))
    # As a server gets it: JSON knows no bytes.
    from mlflow.pyfunc.scoring_server import infer_and_parse_data

    text = {"dataframe_records": [{"image": base64.b64encode(images[0]).decode()}]}
    parsed = infer_and_parse_data(text, schema=model.metadata.get_input_schema())
    assert model.predict(parsed)["label"].tolist() == expected[:1]

    pins = (Path(mlflow.artifacts.download_artifacts(version.source)) / "requirements.txt").read_text().split()
    assert {pin.partition("==")[0] for pin in pins} == set(registry.REQUIREMENTS)
    assert all("==" in pin for pin in pins)


def test_the_models_code_needs_nothing_of_ktray() -> None:
    for module in (str(Path(registry.__file__).with_name("served.py")), predict.__file__):
        tree = ast.parse(Path(module).read_text(encoding="utf-8"))
        names = [n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names]
        names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert names
        assert not [name for name in names if name.split(".")[0] in ("ktray", "torch", "timm")]


def test_a_server_that_is_away(run: Path, folder: Path) -> None:
    lines: list[str] = []
    away = "mlflow.uri=http://127.0.0.1:9"
    assert heard(lines, registry.log, source(run, away), folder, FOUND) == {"model_uri": None}
    assert "is unreachable" in lines[0]
    with pytest.raises(
        KtrayError, match="The export is written, but MLflow is unreachable, so 'stripes' is not registered"
    ):
        heard(lines, registry.log, source(run, away, "export.register_as=stripes"), folder, FOUND)


def test_a_name_that_the_registry_refuses(run: Path, folder: Path) -> None:
    with pytest.raises(KtrayError, match="MLflow rejects the model, so 'a/b' is not registered"):
        registry.log(source(run, "export.register_as=a/b"), folder, FOUND)
