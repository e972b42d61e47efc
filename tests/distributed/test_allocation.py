import json

import pytest

from ktray.distributed.allocation import allocate, cluster_allocation, others
from ktray.distributed.connect import DATA_SETTINGS, TUNED, authentication, worker_settings
from ktray.errors import KtrayError


@pytest.mark.parametrize("cpus", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_workers_and_a_decode_task_always_fit_together(cpus, workers):
    p = allocate(cpus, 0, 1, workers, "auto")
    assert p.workers * p.worker_cpus + min(p.decode_cpus, cpus / 2) <= cpus + 1e-9
    assert p.actor_cpus + p.decode_cpus <= cpus + 1e-9  # both are tasks: neither holds anything for long
    assert p.decode_cpus > 0
    assert p.worker_threads >= 1


@pytest.mark.parametrize("cpus", [2, 4, 16, 64])
@pytest.mark.parametrize("jobs", [2, 3, 5])
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_jobs_that_share_a_cluster_never_hold_it_all(monkeypatch, cpus, jobs, workers):
    import ray

    if cpus / jobs / 2 / workers < 0.02:
        pytest.skip("too many workers for the part")
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus), "GPU": 0.0, "memory": 1e12})
    one = cluster_allocation(workers, "auto", jobs)
    assert jobs * one.workers * one.worker_cpus + one.decode_cpus <= cpus + 1e-9
    gpus = 8 * workers
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": float(gpus), "memory": 1e12})
    one = cluster_allocation(workers, "auto", jobs)
    assert jobs * one.workers * (1 + one.streaming) <= gpus  # each worker's and its teachers'


def test_who_plans_with_all_of_a_cluster_that_others_use_is_told(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 4.0})
    assert others(1) is None
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 2.5})
    assert "hold 1.5 of 4 CPUs" in others(1)
    assert others(2) is None


def test_gpus_are_used_where_there_are_any():
    p = allocate(16, 2, 1, 2, "auto")
    assert (p.worker_gpus, p.actor_gpus, p.actors) == (1.0, 1.0, 2)
    assert allocate(16, 2, 1, 2, False).worker_gpus == 0


def test_small_runs_share_a_gpu():
    p = allocate(16, 1, 1, 1, "auto", gpu_share=0.25)
    assert (p.worker_gpus, p.actor_gpus, p.actors) == (0.25, 0.25, 4)
    assert "0.25 of a GPU" in p.line
    assert allocate(16, 1, 1, 1, "auto", gpu_share=0.4).worker_gpus == 0.5  # a whole number of shares on a GPU
    assert allocate(16, 2, 1, 1, "auto", gpu_share=0.5).actors == 4
    for workers in (2, (1, 2)):
        with pytest.raises(KtrayError, match="2 training workers of one run cannot share a GPU"):
            allocate(16, 2, 1, workers, "auto", gpu_share=0.5)
    with pytest.raises(KtrayError, match="use_gpu=false"):
        allocate(16, 0, 1, 1, True)


def test_jobs_that_outnumber_the_gpus_share_them(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 16.0}}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 1.0, "memory": 1e12})
    assert cluster_allocation(1, "auto", 2).worker_gpus == 0.5  # before: no GPU, without a word
    assert cluster_allocation(1, "auto", 3).worker_gpus == pytest.approx(1 / 3)
    assert cluster_allocation(1, "auto", 2, 0.25).worker_gpus == 0.25
    assert cluster_allocation(1, False, 2).worker_gpus == 0


def test_actors_on_gpus_leave_room_for_a_decode_task():
    p = allocate(4, 8, 1, 8, "auto")
    assert p.actors * p.actor_cpus + p.decode_cpus <= 4 + 1e-9
    assert p.decode_cpus > 0


def test_on_cpus_there_is_a_teacher_for_each_with_memory_and_all_threads_are_used():
    few, many = allocate(16, 0, 1, 1, "auto", 16e9), allocate(16, 0, 1, 1, "auto", 1e12)
    assert (few.actors, few.actor_threads) == (4, 4)
    assert (many.actors, many.actor_threads) == (16, 1)
    assert allocate(2, 0, 1, 1, "auto", 1e9).actors == 1
    spread = allocate(64, 0, 4, 1, "auto", 1e9)  # four nodes of 16: one process has the cores of one
    assert (spread.actor_threads, spread.worker_threads) == (16, 16)


def test_what_cannot_fit_ends_with_the_arithmetic():
    with pytest.raises(
        KtrayError, match=r"3 training workers need 3 GPUs, but the cluster has 1\. Set cluster\.workers=1"
    ):
        allocate(8, 1, 1, 3, True)
    with pytest.raises(KtrayError, match="do not fit on 1 CPUs"):
        allocate(1, 0, 1, 100, "auto")
    with pytest.raises(KtrayError, match="no CPU"):
        allocate(0, 0, 1, 1, "auto")


@pytest.mark.parametrize("nodes", [1, 2, 3, 8])
@pytest.mark.parametrize("cores", [1, 2, 3, 16])
@pytest.mark.parametrize("workers", [(1, 2), (1, 4), (1, 3)])
def test_workers_that_come_and_go_have_a_node_each_on_cpus(nodes, cores, workers):
    p = allocate(nodes * cores, 0, nodes, workers, "auto")
    assert (p.least, p.workers) == workers
    assert 2 * p.worker_cpus > cores, "a second one would fit on a node"
    assert p.worker_cpus + p.decode_cpus <= cores + 1e-9, "nothing can be read on a node with a worker"
    assert p.worker_threads == cores


@pytest.mark.parametrize("nodes", [1, 2, 3, 8])
@pytest.mark.parametrize("cores", [1, 2, 16])
@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_a_decode_task_fits_on_a_node_however_the_workers_lie(nodes, cores, workers):
    p = allocate(nodes * cores, 0, nodes, workers, "auto")
    free = [float(cores)] * nodes
    for _ in range(workers):  # the worst is as even as it gets
        fullest = free.index(max(free))
        free[fullest] -= p.worker_cpus
    assert p.decode_cpus <= max(free) + 1e-9
    assert p.decode_cpus >= min(1, cores / 2) - 1e-9


@pytest.mark.parametrize(("cpus", "gpus"), [(4, 2), (6, 4), (64, 8), (3, 4)])
def test_workers_that_come_and_go_have_a_gpu_each(cpus, gpus):
    p = allocate(cpus, gpus, 1, (1, 16), "auto")
    assert p.worker_gpus == 1
    assert p.worker_cpus * gpus <= cpus / 2
    # Ray Train counts workers by dividing what is reserved for several of them.
    assert sum([p.worker_cpus] * gpus) // p.worker_cpus == gpus


def test_a_range_that_nothing_can_start_ends_with_the_arithmetic():
    with pytest.raises(KtrayError, match=r"at least 2 nodes, but the cluster has 1\. .*workers=1\.\.4"):
        allocate(8, 0, 1, (2, 4), "auto")
    with pytest.raises(KtrayError, match="2 training workers need 2 GPUs, but the cluster has 1"):
        allocate(8, 1, 1, (2, 4), "auto")


def test_a_jobs_relative_store_outlives_the_job(monkeypatch, tmp_path):
    from ktray.distributed.connect import lasting_store

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert lasting_store("./ktray-store") == "./ktray-store"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert lasting_store("./ktray-store") == str(tmp_path / "ktray-store")
    assert lasting_store("s3://bucket/x") == "s3://bucket/x"
    assert lasting_store("/shared/x") == "/shared/x"
    assert lasting_store("~/x") == "~/x"


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_ray_that_is_started_here_asks_for_a_token_of_its_own(no_token):
    one, two = authentication(None), authentication(None)
    assert one["RAY_AUTH_MODE"] == "token"
    assert set(authentication("local")) == set(one)
    assert len(one["RAY_AUTH_TOKEN"]) == 64
    assert one["RAY_AUTH_TOKEN"] != two["RAY_AUTH_TOKEN"]
    assert not list(no_token.iterdir())  # Ray would write ~/.ray/auth_token


def test_what_is_said_of_authentication_stays(no_token, monkeypatch):
    (no_token / ".ray").mkdir()
    (no_token / ".ray" / "auth_token").write_text("x" * 32)
    assert authentication(None) == {"RAY_AUTH_MODE": "token"}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert authentication(None) == authentication("10.0.0.1:6379") == {}
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert authentication("10.0.0.1:6379") == {}
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(no_token / "none"))
    assert set(authentication(None)) == {"RAY_AUTH_TOKEN"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "y" * 32)
    assert authentication(None) == {}


def test_a_token_goes_to_no_address_that_was_not_meant(no_token):
    assert authentication("auto") == {"RAY_AUTH_MODE": "disabled"}
    (no_token / ".ray").mkdir()
    (no_token / ".ray" / "auth_token").write_text("x" * 32)
    assert authentication("auto") == {"RAY_AUTH_MODE": "token"}
    assert authentication("10.0.0.1:6379") == {"RAY_AUTH_MODE": "disabled"}


def test_workers_get_the_address_of_s3_and_no_credentials(monkeypatch):
    for name in (*TUNED, *DATA_SETTINGS, "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    assert worker_settings() == TUNED
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("KTRAY_DATA_ROOTS", "s3://photos")
    kept = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", "KTRAY_DATA_ROOTS": "s3://photos"}
    assert worker_settings() == {"AWS_ENDPOINT_URL": "http://store:9000", **kept, **TUNED}
    # Ray refuses a name that the job was submitted with.
    job = {"runtime_env": {"env_vars": {"AWS_ENDPOINT_URL": "http://store:9000"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert worker_settings() == {**kept, **TUNED}
    monkeypatch.setenv("MALLOC_TOP_PAD_", "0")  # whoever knows better says so
    assert worker_settings()["MALLOC_TOP_PAD_"] == "0"
