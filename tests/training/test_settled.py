"""Decisions that a store keeps: made once, and then the same for every run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ktray.models.compilation import Compilation
from ktray.models.precision import Precision
from ktray.storage.store import Dir
from ktray.tasks.base import task_kind
from ktray.training import settled
from ktray.training.inputs import StudentSpec
from ktray.training.settled import settle_compilation, settle_precision
from ktray.training.worker import WorkerContext

STUDENT = StudentSpec(task_kind("classification"), "test_resnet", {}, 3, 32)
ON_CPU = WorkerContext(torch.device("cpu"), 0, 1, 1.0)
PRECISION = Precision(None, False, "a test")


def compilation(store: Path, env: WorkerContext, requested: Any, steps: int = 100) -> Compilation:
    model = STUDENT.make(bare=True).model
    return settle_compilation(Dir(str(store)), STUDENT, model, PRECISION, env, 8, steps, requested)


@pytest.mark.parametrize(
    ("requested", "mode"), [(True, "default"), (False, None), ("graphs", "reduce-overhead"), ("auto", None)]
)
def test_the_recipe_decides_and_a_cpu_is_not_measured(tmp_path: Path, requested: Any, mode: str | None) -> None:
    assert compilation(tmp_path, ON_CPU, requested).mode == mode
    assert not list(tmp_path.iterdir())


def test_the_measurement_on_a_gpu_is_made_once_for_each_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def choose(*arguments: Any) -> Compilation:
        measured.append(arguments[-1])
        return Compilation("default" if len(measured) == 1 else None, f"measurement {len(measured)}")

    monkeypatch.setattr(settled, "choose_compilation", choose)
    monkeypatch.setattr(settled, "_machine", lambda env: ("cuda", "a GPU"))
    env = replace(ON_CPU, device=torch.device("cuda"))
    first = compilation(tmp_path, env, "auto")
    assert compilation(tmp_path, env, "auto") == first == Compilation("default", "measurement 1")
    assert compilation(tmp_path, env, "auto", steps=200).mode is None
    assert measured == [100, 200]
    assert compilation(tmp_path, env, False).mode is None


def test_a_precision_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Precision("bf16", True, "the first"), Precision(None, False, "the second")]
    monkeypatch.setattr(settled, "choose_precision", lambda *arguments, **options: found.pop(0))
    model = STUDENT.make(bare=True).model
    for _ in range(2):
        chosen = settle_precision(Dir(str(tmp_path)), STUDENT, model, ON_CPU, 8, "auto")
        assert chosen.reason == "the first"
    assert len(found) == 1
    assert any(
        value.is_contiguous(memory_format=torch.channels_last) for value in model.parameters() if value.dim() == 4
    )
