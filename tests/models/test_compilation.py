"""When a training is compiled: only if the arithmetic says that it may pay, and a measurement that it does."""

from __future__ import annotations

from copy import deepcopy
from functools import partial, partialmethod
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from ktray.models import compilation
from ktray.models.compilation import COMPILE_S, MOST_SAVED, Compilation, choose_compilation, may_pay
from ktray.models.precision import Precision

CPU = torch.device("cpu")
PRECISION = Precision(None, False, "a test")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3)


def chosen(model: nn.Module, steps: int, backend: Any = "eager") -> Compilation:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
        return choose_compilation(model, PRECISION, CPU, 32, 4, steps)


def test_the_arithmetic_counts_the_measurement_and_the_training() -> None:
    enough = 2 * COMPILE_S / MOST_SAVED
    assert may_pay(1_000, 1.01 * enough / 1_000)
    assert not may_pay(1_000, 0.99 * enough / 1_000)


def test_a_short_training_is_not_compiled(model: nn.Module) -> None:
    found = chosen(model, 10, backend=None)  # a backend that does not exist is not asked
    assert found.mode is None
    assert found.reason.startswith("10 steps of ")
    assert "too few" in found.reason


@pytest.mark.parametrize(("compiled", "steps", "mode"), [(0.5, 2_000, "default"), (0.5, 20, None), (1.1, 2_000, None)])
def test_what_is_saved_must_exceed_what_compiling_takes(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, compiled: float, steps: int, mode: str | None
) -> None:
    seconds, clock = iter([1.0, compiled]), iter([100.0, 160.0])  # one minute to compile
    monkeypatch.setattr(compilation, "may_pay", lambda steps, seconds: True)
    monkeypatch.setattr(compilation, "_seconds", lambda *arguments: next(seconds))
    monkeypatch.setattr(compilation, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = chosen(model, steps)
    assert found.mode == mode
    assert found.reason == f"measured: eager 1,000 ms, compiled {1000 * compiled:,.0f} ms a step, compiling 60 s"


def test_the_copy_is_compiled_and_timed_and_the_model_is_as_before(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "may_pay", lambda steps, seconds: True)
    before, state, graphs = deepcopy(model.state_dict()), torch.get_rng_state(), []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    found = chosen(model, 1, backend=counting)
    assert graphs
    assert found.mode is None, "one step cannot save what compiling took"
    assert found.reason.startswith("measured: eager ")
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    graphs.clear()
    model(torch.zeros(2, 3, 32, 32))
    assert not graphs, "the model itself is not compiled"


def test_a_compiler_that_fails_is_no_error(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler on this machine")

    monkeypatch.setattr(compilation, "may_pay", lambda steps, seconds: True)
    found = chosen(model, 10**6, backend=broken)
    assert (found.mode, found.failed) == (None, True)
    assert found.reason == "torch.compile failed: no compiler on this machine"


def test_memory_that_does_not_suffice_is_no_error(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compilation, "_seconds", full)
    assert chosen(model, 10).failed


@pytest.mark.parametrize("forgiving", [True, False])
def test_what_cannot_be_compiled_runs_uncompiled_where_nobody_asked_for_it(forgiving: bool) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler on this machine")

    model = nn.Linear(2, 3)
    expected = model(torch.ones(1, 2))
    with pytest.MonkeyPatch.context() as patch:
        plain = nn.Module.compile
        patch.setattr(nn.Module, "compile", lambda self, mode: plain(self, backend=broken))
        Compilation("default", "a test").apply(model, forgiving)
    try:
        if forgiving:
            assert torch.equal(model(torch.ones(1, 2)), expected)
        else:
            with pytest.raises(Exception, match="no compiler on this machine"):
                model(torch.ones(1, 2))
    finally:
        torch._dynamo.config.suppress_errors = False
        torch.compiler.reset()


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
def test_a_decision_is_read_back_and_applied_in_place(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    model = nn.Linear(2, 2)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append((self, options)))
    decision = Compilation.from_dict(Compilation(mode, "a reason").to_dict())
    decision.apply(model)
    assert asked == ([] if mode is None else [(model, {"mode": mode})])
    assert decision.graphs == (mode == "reduce-overhead")


@pytest.mark.gpu
def test_a_real_compiler_is_timed_on_a_gpu(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "may_pay", lambda steps, seconds: True)
    choose = partial(choose_compilation, model, Precision("bf16", True, "a test"), torch.device("cuda"), 64, 32)
    found = choose(1)
    assert found.mode is None
    assert found.reason.startswith("measured: eager ")
