"""What is taken from Ray's private parts, against the Ray that is installed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from ktray.distributed import ray_internals as module
from ktray.distributed.ray_data import ordered


def test_an_executor_rests_longer_after_each_step_that_took_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, rests = [100.0], []
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def sleep(seconds: float) -> None:
        rests.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(module.time, "sleep", sleep)
    resting = module._resting()()
    resting.before_execution_starts(None)
    for took in (0.001, 0.001, 0.001, 0.001, 0.001, 0.1, 0.004):
        now[0] += took
        resting.on_execution_step(None)
    assert rests == [0.005, 0.01, 0.02, 0.04, 0.04, 0.005]


def test_the_executor_of_a_dataset_rests(cluster: Any) -> None:
    dataset = ordered([{"i": i} for i in range(3)]).map_batches(lambda batch: batch, batch_format="pyarrow")
    made: list[Any] = []
    module.capture_executor(dataset, made.append)
    batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    assert [row["i"] for batch in batches for row in batch.to_pylist()] == [0, 1, 2]
    (executor,) = made
    assert any(isinstance(callback, module._resting()) for callback in executor._callbacks)


def test_the_launcher_of_trainings_does_not_import_ray_train() -> None:
    packages = "ray.train", "ray.tune", "ray.data"
    code = f"import sys, ktray.training.ray_train; print([name for name in {packages} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_names_of_ray_train_are_imported_when_they_are_used() -> None:
    for name in module._RAY_TRAIN:
        assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'ControllerCall'"):
        _ = module.ControllerCall
