"""What MLflow does not accept is reported with the remedy, and nothing is lost."""

import shutil
import sqlite3
from pathlib import Path

import pytest
from heard import hearing

from ktray.tracking.mlflow_server import remedy
from ktray.tracking.tracker import Tracker


def tracker(folder: Path) -> Tracker:
    uri = f"sqlite:///{folder}/mlflow.db"
    return Tracker(uri, "exp", folder / "run" / "log.jsonl", folder / "run" / "mlflow.json", folder)


@pytest.mark.parametrize("found", ["0123456789ab", "1"])
def test_a_database_of_another_mlflow_is_reported_with_the_remedy(tmp_path: Path, found: str, database: Path) -> None:
    from mlflow import MlflowClient

    shutil.copy(database, tmp_path / "mlflow.db")
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        (right,) = connection.execute("select version_num from alembic_version").fetchone()
        connection.execute("update alembic_version set version_num=?", (found,))
    t = tracker(tmp_path)
    t.start("r1")
    t.metrics(0, {"loss": 1.0})
    pending = t.close(30)
    assert pending == 2
    said: list[str] = []
    with hearing(said):
        t.tell(pending)
    (line,) = said
    assert f"mlflow db upgrade sqlite:///{tmp_path}/mlflow.db" in line
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("update alembic_version set version_num=?", (right,))
    assert tracker(tmp_path).close(60) == 0  # nothing is lost
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (found_run,) = client.search_runs([client.get_experiment_by_name("exp").experiment_id])
    assert found_run.data.metrics == {"loss": 1.0}


def test_remedies_of_mlflow() -> None:
    from mlflow.exceptions import MlflowException

    uri = "sqlite:////s/mlflow.db"
    assert "install that version" in remedy(Exception("Can't locate revision identified by 'abc'"), uri)
    assert "MLFLOW_TRACKING_USERNAME" in remedy(MlflowException("API request failed with error code 403"), uri)
    assert "MLFLOW_TRACKING_SERVER_CERT_PATH" in remedy(Exception("[SSL: CERTIFICATE_VERIFY_FAILED] x"), uri)
    assert "writable" in remedy(Exception("attempt to write a readonly database"), uri)
    assert remedy(Exception("something else"), uri) == ""
