"""One local Ray cluster for all tests of a process: its start-up is what makes suites slow."""

import gc
import os
import time
import uuid
from pathlib import Path

# Ray's workers import the tests' own callables, from whichever folder a test stands in.
_HERE = Path(__file__).parent
_FOLDERS = sorted({str(path.parent) for path in _HERE.rglob("*.py")})
_PATHS = [*_FOLDERS, str(_HERE.parent), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in _PATHS if p)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a model hub
os.environ["RAY_AUTH_MODE"] = "disabled"  # a token file of this machine must not decide a test
if not os.environ.get("KTRAY_GPU_TESTS"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the other tests compare tensors of this process, on the CPU

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def cluster():
    """The plan of a small local cluster; CPUs are logical, so that nothing waits on a machine with few cores."""
    from ktray.distributed.allocation import cluster_allocation
    from ktray.distributed.connect import connect

    os.environ.pop("RAY_ADDRESS", None)
    connect()
    import ray

    yield cluster_allocation(1, False)
    # Readers that tests left half-read cancel their tasks when they are collected, and Ray ends the process if a task
    # ends just then. A session has lost its summary to a death at this place, perhaps to this one.
    gc.collect()
    time.sleep(2)
    # A thread of Ray Data that is still at it would otherwise start a Ray of its own, while this process ends.
    from ray._private import auto_init_hook

    auto_init_hook.enable_auto_connect = False
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_proxy():
    """One S3 server in memory for all tests that need one, behind a proxy that can fail."""
    import boto3
    from faulty_s3 import KEYS, moto, proxy

    with moto() as address, proxy(address) as server:
        keys = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
        boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys).create_bucket(Bucket="ktray-test")
        yield server


@pytest.fixture
def s3(s3_proxy, monkeypatch, tmp_path_factory):
    """The proxy, with an empty place of the test's own at ``s3.home``."""
    from faulty_s3 import KEYS

    from ktray.storage import lease, retry
    from ktray.storage import s3 as module

    made, prepare = [], lease.Lease.__init__

    def remembered(self, *arguments):
        prepare(self, *arguments)
        made.append(self)

    monkeypatch.setattr(lease.Lease, "__init__", remembered)
    copies = str(tmp_path_factory.mktemp("copies"))
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3_proxy.url, "KTRAY_CACHE": copies}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retry, "_PAUSES_S", (0.02, 0.2))
    monkeypatch.setattr(module, "_SDK_ATTEMPTS", 1)  # its pauses are of seconds
    module._open.cache_clear()
    s3_proxy.fault, s3_proxy.home = "", f"s3://ktray-test/{uuid.uuid4().hex}"
    s3_proxy.seen.clear()
    yield s3_proxy
    s3_proxy.fault = ""
    # Holders that a test left alive would go on to beat, into the next test's counts.
    for one in made:
        one._stop.set()
        if one._keeper:
            one._keeper.join(30)
    s3_proxy.hide.clear()


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """An empty MLflow database, to be copied; making its tables takes MLflow seconds."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("empty")
    MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def photo():
    """(173, 260, 3) uint8, neither square nor a round size."""
    from photo import make_photo

    return make_photo(173, 260)


def pytest_collection_modifyitems(items):
    """Skip long tests unless they are asked for, and tests of what only a GPU can show where there is none."""
    for item in items:
        if item.get_closest_marker("long") and not os.environ.get("KTRAY_LONG_TESTS"):
            item.add_marker(pytest.mark.skip(reason="long; KTRAY_LONG_TESTS=1 runs it"))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))
