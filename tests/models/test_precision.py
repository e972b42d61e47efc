from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import nn

from ktray.models import precision
from ktray.models.precision import Precision, choose_precision, fp32_channels_last_is_safe

CONV = ("test_resnet", 32)


def test_strided_1x1_convolutions_on_few_channels_are_unsafe() -> None:
    assert not fp32_channels_last_is_safe(nn.Sequential(nn.Conv2d(3, 48, 1, stride=2)))
    assert not fp32_channels_last_is_safe(nn.Conv2d(16, 16, 1, stride=2, groups=16))
    assert fp32_channels_last_is_safe(nn.Conv2d(64, 128, 1, stride=2))
    assert fp32_channels_last_is_safe(nn.Conv2d(3, 48, 1))
    assert fp32_channels_last_is_safe(nn.Conv2d(3, 48, 3, stride=2))


@pytest.mark.parametrize(("name", "safe"), [("fastvit_t8", False), ("mobilenetv3_small_050", True), ("resnet18", True)])
def test_real_students(name: str, safe: bool) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=2)
    assert fp32_channels_last_is_safe(model) is safe


def measured(monkeypatch: pytest.MonkeyPatch, seconds: dict, crowded: bool = False) -> list:
    """Replace the clock by a table; what was offered to it is returned."""
    offered: list = []

    def table(model, candidates, *_):
        offered.extend(candidates)
        return {c: seconds.get(c, 1.0) for c in candidates}, crowded

    monkeypatch.setattr(precision, "_measure", table)
    return offered


def test_the_fastest_wins_when_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model(CONV[0])
    offered = measured(monkeypatch, {("bf16", True, False): 0.5})
    found = choose_precision(model, "cpu", 32, 8, train=True)
    assert offered == [(None, False, False), (None, True, False), ("bf16", True, False), ("bf16", False, False)]
    assert (found.autocast_dtype, found.memory_format) == (torch.bfloat16, torch.channels_last)
    assert "bf16 channels-last 500 ms" in found.reason
    measured(monkeypatch, {("bf16", True, False): 0.95})
    found = choose_precision(model, "cpu", 32, 8, train=True)
    assert (found.autocast_dtype, found.memory_format) == (None, torch.contiguous_format)


def test_a_layout_need_only_be_faster_and_may_win_beside_a_format_that_is_not_clearly_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = timm.create_model(CONV[0])
    for seconds, expected in (
        ({(None, True, False): 0.95}, (None, True)),
        ({(None, True, False): 0.99}, (None, False)),
        ({(None, True, False): 0.95, ("bf16", True, False): 0.92}, (None, True)),
    ):
        measured(monkeypatch, seconds)
        found = choose_precision(model, "cpu", 32, 8, train=True)
        assert (found.autocast, found.channels_last) == expected


def test_beside_busy_programs_another_format_must_be_twice_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of a default run beside tests, which then took 8 times as long in bfloat16 as in float32."""
    seen = {
        (None, False, False): 42.7,
        (None, True, False): 40.0,
        ("bf16", True, False): 37.6,
        ("bf16", False, False): 72,
    }
    model = timm.create_model(CONV[0])
    for crowded, expected in ((True, (None, True)), (False, ("bf16", True))):
        measured(monkeypatch, seen, crowded)
        found = choose_precision(model, "cpu", 32, 8, train=True)
        assert (found.autocast, found.channels_last) == expected
    measured(monkeypatch, {**seen, ("bf16", True, False): 17.0}, True)  # as with instructions for it
    assert choose_precision(model, "cpu", 32, 8, train=True).autocast == "bf16"


def test_candidates_are_only_the_safe_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    stem = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2), nn.Conv2d(4, 4, 3))
    offered = measured(monkeypatch, {})
    choose_precision(stem, "cpu", 32, 8, train=True)
    assert (None, True, False) not in offered
    assert ("bf16", True, False) in offered
    offered = measured(monkeypatch, {})
    choose_precision(stem, "cpu", 32, 8, train=False)
    assert (None, True, False) in offered
    offered = measured(monkeypatch, {})
    choose_precision(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), "cpu", 32, 8, train=True)
    assert offered == [(None, False, False), ("bf16", False, False)]


def test_a_format_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stem = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2), nn.Conv2d(4, 4, 3))
    found = choose_precision(stem, "cpu", 32, 8, train=True, precision="fp32")
    assert (found.autocast, found.channels_last) == (None, False)
    offered = measured(monkeypatch, {})
    assert choose_precision(stem, "cpu", 32, 8, train=True, precision="bf16").autocast == "bf16"
    assert all(autocast == "bf16" for autocast, *_ in offered)


def test_on_a_gpu_the_layout_and_the_algorithm_of_convolutions_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model(CONV[0])
    # FastViT-S12 on an H200 (docs/measured): 2,604 images/s with both, 1,122 and 1,298 with one of them, 1,300 without.
    rates = {("bf16", True, True): 2604, ("bf16", False, True): 1298, ("bf16", True, False): 1122}
    offered = measured(monkeypatch, {c: 1 / rates.get(c, 1300) for c in [*rates, ("bf16", False, False)]})
    found = choose_precision(model, "cuda", 32, 8, train=True)
    assert (found.autocast, found.channels_last, found.benchmark) == ("bf16", True, True)
    assert offered[0] == ("bf16", True, True)
    assert len(set(offered)) == 4
    assert "measured on a GPU" in found.reason
    slow_search = {("bf16", True, True): 1.0, ("bf16", False, True): 1.0, ("bf16", False, False): 0.5}
    measured(monkeypatch, slow_search)
    found = choose_precision(model, "cuda", 32, 8, train=True)
    assert (found.channels_last, found.benchmark) == (False, False)
    assert choose_precision(model, "cuda", 32, 8, train=True, precision="fp32").autocast is None


def test_rules_of_other_devices() -> None:
    linear = choose_precision(nn.Linear(2, 2), "cuda:1", 32, 8, train=False)
    assert (linear.autocast, linear.channels_last, linear.benchmark) == ("bf16", False, False)
    assert choose_precision(timm.create_model(CONV[0]), "mps", 32, 8, train=True).autocast is None


def test_a_decision_of_an_older_version_is_read_and_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    model = nn.Conv2d(3, 4, 3)
    Precision.from_dict({"autocast": "bf16", "channels_last": True, "reason": "the rule on CUDA"}).apply(model)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.backends.cudnn.benchmark is False


def test_a_slow_model_is_not_measured_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(precision.time, "perf_counter", lambda: float(next(clock)))
    steps = []
    monkeypatch.setattr(precision, "_timed", lambda step: steps.append(step) or 10.0)
    seconds, _ = precision._measure(
        nn.Conv2d(3, 4, 3), [(None, False, False), ("bf16", True, False)], (8, 8), 64, True, torch.device("cpu")
    )
    assert 1 <= len(seconds) <= 2
    assert len(steps) < 8


def test_the_measurement_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_BUDGET_S", 1.0)
    model = timm.create_model(CONV[0], num_classes=3).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    found = choose_precision(model, "cpu", 32, 4, train=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert "fp32 contiguous" in found.reason
    assert Precision.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize("crowded", ["never", "from the start", "later"])
def test_beside_busy_programs_formats_are_compared_in_one_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, crowded: str
) -> None:
    """The decision is kept, so it must not depend on who else used the cores meanwhile."""
    seen = {"never": [0.0, 0.001, 0.002], "from the start": [0.0, 1000.0], "later": [0.0, 0.001, 1000.0]}[crowded]
    waits = iter([*seen, *[0.0] * 9])
    monkeypatch.setattr(precision, "waited_seconds", lambda: next(waits))
    monkeypatch.setattr(precision, "_BUDGET_S", 0.2)
    used: set[tuple[str, int]] = set()
    for name in ("_timed", "_timed_thread"):
        real = getattr(precision, name)
        monkeypatch.setattr(
            precision, name, lambda step, n=name, real=real: used.add((n, torch.get_num_threads())) or real(step)
        )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with caplog.at_level("INFO", "ktray"):
            seconds, alone = precision._measure(
                nn.Conv2d(3, 4, 3), [(None, False, False), ("bf16", False, False)], (8, 8), 4, True, torch.device("cpu")
            )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(seconds) == 2
    assert all(value > 0 for value in seconds.values())
    assert alone is (crowded != "never")
    assert used == ({("_timed", 2), ("_timed_thread", 1)} if alone else {("_timed", 2)})
    assert ("in one thread" in caplog.text) is alone
