"""The size of windows is decided once per stage, by the memory of a worker."""

from types import SimpleNamespace

import pytest
import ray

from ktray.distributed.allocation import allocate, worker_memory
from ktray.recipe.train import TrainConfig
from ktray.stages import windows
from ktray.stages.windows import with_windows
from ktray.storage.store import Store
from ktray.training.inputs import TargetSet


@pytest.fixture
def stage(tmp_path):
    return Store(str(tmp_path)).stage("transfer", "0123456789abcdef")


def runtime(plan):
    return SimpleNamespace(plan=plan, cluster=SimpleNamespace(jobs=1))


def test_a_restart_on_other_machines_keeps_the_size(stage, monkeypatch):
    taught = TargetSet(stage, (("a", 8),), 3 * 224**2, (), views=4)
    here = runtime(allocate(4, 0, 1, 1, False))
    memory = [8e9]
    monkeypatch.setattr(windows, "worker_memory", lambda plan, jobs: memory[0])
    assert with_windows(TrainConfig(), taught, 512, here, stage).window_bytes == 1_000_000_000
    memory[0] = 64e9
    assert with_windows(TrainConfig(), taught, 512, here, stage).window_bytes == 1_000_000_000
    given = TrainConfig(window_bytes=77)
    assert with_windows(given, taught, 512, here, stage) is given


def node(memory, cpus=8.0, gpus=0.0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus, "memory": memory}}


@pytest.mark.parametrize(
    ("plan", "jobs", "expected"),
    [
        (allocate(16, 0, 2, 1, False), 1, 10e9),  # the machine with the least memory that works
        (allocate(16, 0, 2, 4, False), 1, 5e9),  # two workers on each
        (allocate(16, 0, 2, 4, False), 2, 2.5e9),
        (allocate(16, 4, 2, 4, True), 1, 5e9),  # only the machine with the GPUs
    ],
)
def test_memory_of_a_worker(monkeypatch, plan, jobs, expected):
    nodes = [node(1e9, cpus=0), node(10e9), node(20e9, gpus=4.0), node(1e9, alive=False)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert worker_memory(plan, jobs) == expected
