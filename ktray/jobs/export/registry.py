"""The export in MLflow: a logged model that classifies encoded images, and a version in the registry."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from ktray.errors import KtrayError
from ktray.jobs.export.predict import Classifier
from ktray.jobs.export.targets.base import all_targets
from ktray.pipeline.finished_run import FinishedRun
from ktray.redact import scrub
from ktray.storage.store import local_home
from ktray.tracking.mlflow_server import Server, is_transient
from ktray.tracking.tracker import tracking_uri

logger = logging.getLogger("ktray")

MODEL, TAG = "export", "ktray.export"
# Packages that the model's code imports. Without these pins, MLflow would load the model in a new process to find them.
REQUIREMENTS = ("mlflow", "numpy", "onnxruntime", "pandas", "pillow")
_TIMEOUT_S = 10.0


def log(source: FinishedRun, folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Log the model, and register it if the recipe says so. An existing model or version of the same export is reused.

    Args:
        source: the run.
        folder: the local folder of the export.
        content: the content of ``export.json``.

    Returns:
        ``model_uri`` (None if the server is unreachable), and, if the model was registered, ``name``, ``version`` and
        ``alias``.

    Raises:
        KtrayError: the model must be registered, but the server is unreachable or rejects it. The export itself is
            complete.
    """
    part = source.recipe.export
    uri = tracking_uri(source.recipe.mlflow.uri, local_home(source.store))
    try:
        return _log(source, folder, content, uri)
    except KtrayError:
        raise
    except Exception as error:  # errors of MLflow, its database or its server
        text = str(scrub(f"{type(error).__name__}: {' '.join(str(error).split())}"))[:300].rstrip(".")
        why = "is unreachable" if is_transient(error) else "rejects the model"
        if part.register_as:
            raise KtrayError(
                f"The export is written, but MLflow {why}, so '{part.register_as}' is not registered ({text})",
                "Check mlflow.uri and export.register_as, then run the same command again.",
            ) from error
        logger.info(f"mlflow    {why}: the export is not logged there ({text}); to retry, run the same command again")
        return {"model_uri": None}


def _log(source: FinishedRun, folder: Path, content: dict[str, Any], uri: str) -> dict[str, Any]:
    part = source.recipe.export
    server = Server(uri, source.recipe.mlflow.experiment, {"run_id": None, "stages": {}}, _TIMEOUT_S)
    mark = f"{content['key']}-{part.serve}"
    model_id, location = _model(server, source, folder, content, mark)
    logged: dict[str, Any] = {"model_uri": f"models:/{model_id}"}
    if not part.register_as:
        return logged
    with _default(uri):
        version = _version(server, part.register_as, model_id, location, mark, content)
    server.client.set_registered_model_alias(part.register_as, part.alias, version)
    logger.info(f"mlflow    models:/{part.register_as}@{part.alias} is version {version}")
    return {**logged, "name": part.register_as, "version": version, "alias": part.alias}


def _model(server: Server, source: FinishedRun, folder: Path, content: dict[str, Any], mark: str) -> tuple[str, str]:
    """Return id and location of the logged model, which may be that of an earlier call with the same files."""
    client = server.client
    models = client.search_logged_models([server.experiment_id], f"tags.`{TAG}` = '{mark}'", max_results=10)
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

    for model in models:
        if model.status == LoggedModelStatus.READY:
            return str(model.model_id), str(model.artifact_location)
    run_id = _run(server, source)
    entry = client.create_logged_model(
        server.experiment_id, name=MODEL, source_run_id=run_id, tags={TAG: mark, "ktray.run": source.run_id}
    )
    with tempfile.TemporaryDirectory(prefix="ktray-") as scratch:
        save(folder, Path(scratch) / "model", source.recipe.export.serve, entry, run_id)
        client.log_model_artifacts(entry.model_id, f"{scratch}/model")
    client.finalize_logged_model(entry.model_id, LoggedModelStatus.READY)
    if run_id is not None:
        client.log_outputs(run_id, [LoggedModelOutput(entry.model_id, step=0)])
        for name in ("README.md", "export.json"):
            client.log_artifact(
                run_id, str(folder / name), "export_files"
            )  # the name MODEL would be the folder of the model itself
        now = int(content["time"] * 1000)
        client.log_batch(run_id, metrics=[Metric(name, value, now, 0) for name, value in metrics(content).items()])
    return str(entry.model_id), str(entry.artifact_location)


def save(folder: Path, target: Path, serve: str, entry: Any = None, run_id: str | None = None) -> None:
    """Write an MLflow model of an export.

    Args:
        folder: the export.
        target: a folder that does not exist yet.
        serve: ``float`` or ``int8``.
        entry: the logged model to which the files will belong.
        run_id: id of the run in MLflow.
    """
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array, Map

    served = next(target.file for _, target in all_targets() if target.serves == serve)
    found = Classifier(folder / served)
    answer: list[Any] = [ColSpec(DataType.string, "label"), ColSpec(DataType.double, "probability")]
    if found.thresholds is not None:
        answer = [ColSpec(Array(DataType.string), "labels")]
    if found.maps:
        answer = [ColSpec(DataType.binary, "mask")]
    answer.append(ColSpec(Map(DataType.double), "shares" if found.maps else "probabilities"))
    model = None
    if entry is not None:
        model = Model(
            artifact_path=entry.artifact_location, run_id=run_id, model_uuid=entry.model_id, model_id=entry.model_id
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns that the model has no example image
        mlflow.pyfunc.save_model(
            str(target),
            python_model=str(Path(__file__).with_name("served.py")),
            artifacts={"model": str(folder / served), "predict": str(folder / "predict.py")},
            mlflow_model=model,
            signature=ModelSignature(
                Schema([ColSpec(DataType.binary, "image")]),
                Schema(answer),
            ),
            pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS],
        )


def metrics(content: dict[str, Any]) -> dict[str, float]:
    """Return ``export.<model>.<number>`` for MLflow: the metric on validation, bytes, and the median of each row."""
    values: dict[str, float] = {}
    for name, model in content["latency"]["models"].items():
        values[f"export.{name}.val"] = content["metric"]["val"][name]["metric"]
        for row in model["rows"]:
            values[f"export.{name}.median_ms_batch{row['batch']}_threads{row['threads']}"] = row["median_ms"]
    for name, target in all_targets():
        if target.file in content["files"]:
            values[f"export.{name}.bytes"] = float(target.size(content["files"]))
    return values


def _run(server: Server, source: FinishedRun) -> str | None:
    """Return the id of the run in MLflow, if this server has it."""
    run_id = (source.result.get("mlflow") or {}).get("run_id")
    if run_id is None:
        return None
    try:
        server.client.get_run(run_id)
    except Exception as error:
        if is_transient(error):
            raise
        return None
    return str(run_id)


@contextlib.contextmanager
def _default(uri: str) -> Iterator[None]:
    """Within this context, the environment names the tracking server: MLflow's registry in a database looks up the
    model there, and not with the URI of its client."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before


def _version(server: Server, name: str, model_id: str, location: str, mark: str, content: dict[str, Any]) -> str:
    client = server.client
    try:
        client.create_registered_model(name)
    except Exception as error:
        if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
            raise
    quoted = name.replace("'", "\\'")
    for version in client.search_model_versions(f"name = '{quoted}'", max_results=1000):
        if version.tags.get(TAG) == mark:
            return str(version.version)
    created = client.create_model_version(
        name,
        location,
        tags={TAG: mark, "ktray.run": content["run_id"]},
        description=f"{content['student']['name']}, exported by ktray from run {content['run_id']}",
        model_id=model_id,
    )
    return str(created.version)
