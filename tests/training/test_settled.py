"""Decisions that a store keeps: made once, and then the same for every run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ktray.models.compilation import Compilation
from ktray.models.precision import Precision
from ktray.recipe.schema import TrainConfig
from ktray.storage.store import Dir
from ktray.tasks.base import task_kind
from ktray.training import settled
from ktray.training.inputs import StudentSpec
from ktray.training.settled import settle_compilation, settle_precision
from ktray.training.worker import WorkerContext

STUDENT = StudentSpec(task_kind("classification"), "test_resnet", {}, 3, 32)
ON_CPU = WorkerContext(torch.device("cpu"), 0, 1, 1.0)
PRECISION = Precision(None, False, "a test")


def compilation(
    store: Path, env: WorkerContext, requested: Any, steps: int = 100, accumulate: int = 1, objective: str = "oriented"
) -> Compilation:
    model, part = STUDENT.make(bare=True).model, TrainConfig(compile=requested, accumulate=accumulate)
    return settle_compilation(Dir(str(store)), STUDENT, model, PRECISION, env, 8, steps, part, [objective])


@pytest.mark.parametrize(
    ("requested", "mode"), [(True, "default"), (False, None), ("graphs", "reduce-overhead"), ("auto", None)]
)
def test_the_recipe_decides_and_a_cpu_is_not_measured(tmp_path: Path, requested: Any, mode: str | None) -> None:
    assert compilation(tmp_path, ON_CPU, requested).mode == mode
    assert not list(tmp_path.iterdir())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[WorkerContext, list[tuple[int, int]]]:
    """A worker on a GPU that does not exist, and (batch, steps) of each measurement. The second one fails."""
    measured: list[tuple[int, int]] = []

    def choose(*arguments: Any) -> Compilation:
        measured.append(arguments[-2:])
        number = len(measured)
        return Compilation(None if number == 2 else "default", f"measurement {number}", failed=number == 2)

    monkeypatch.setattr(settled, "choose_compilation", choose)
    monkeypatch.setattr(settled, "_machine", lambda env: ("cuda", "a GPU"))
    return replace(ON_CPU, device=torch.device("cuda")), measured


def test_a_measurement_on_a_gpu_is_made_once_for_each_training(tmp_path: Path, gpu: Any) -> None:
    env, measured = gpu
    first = compilation(tmp_path, env, "auto")
    assert compilation(tmp_path, env, "auto") == first == Compilation("default", "measurement 1")
    assert compilation(tmp_path, env, "auto", steps=200).reason == "measurement 2"
    assert compilation(tmp_path, env, "auto", steps=200).reason == "measurement 3", "a failed one is repeated"
    assert compilation(tmp_path, env, "auto", steps=200).reason == "measurement 3"
    assert compilation(tmp_path, env, "auto", objective="consistency").reason == "measurement 4"
    assert compilation(tmp_path, env, False) == Compilation(None, "train.compile=false")
    assert measured == [(8, 100), (8, 200), (8, 200), (8, 100)]


def test_parts_of_a_batch_are_measured_as_they_are_trained(tmp_path: Path, gpu: Any) -> None:
    env, measured = gpu
    compilation(tmp_path, env, "auto", accumulate=4)
    assert measured == [(2, 400)]


def test_a_precision_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Precision("bf16", True, "the first"), Precision(None, False, "the second")]
    monkeypatch.setattr(settled, "choose_precision", lambda *arguments, **options: found.pop(0))
    model = STUDENT.make(bare=True).model
    for _ in range(2):
        chosen = settle_precision(Dir(str(tmp_path)), STUDENT, model, ON_CPU, 8, "auto")
        assert chosen.reason == "the first"
    assert len(found) == 1
    assert all(
        value.is_contiguous(memory_format=torch.channels_last) for value in model.parameters() if value.dim() == 4
    )
