"""One local Ray cluster for the whole test session: its start-up is what makes suites slow."""

import os
from pathlib import Path

# Ray's workers import the tests' own callables.
_HERE = Path(__file__).parent
_PATHS = [str(_HERE), str(_HERE / "helpers"), str(_HERE.parent), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in _PATHS if p)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_AUTH_MODE"] = "disabled"  # a token file of this machine must not decide a test

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def cluster():
    """The plan of a small local cluster; CPUs are logical, so that nothing waits on a machine with few cores."""
    from ktray.resources import cluster_plan, connect

    os.environ.pop("RAY_ADDRESS", None)
    connect()
    import ray

    yield cluster_plan(1, False)
    ray.shutdown()


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """An empty MLflow database, to be copied; making its tables takes MLflow seconds."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("empty")
    MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"
