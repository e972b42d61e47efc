"""Times are those of the calls, in a process of its own."""

from pathlib import Path

import pytest

from ktray.accounting.device import usable_cpus
from ktray.errors import KtrayError
from ktray.jobs.export import latency


def test_median_and_percentile_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    turns = iter(range(1000))

    def call() -> None:
        clock[0] += 0.012 if next(turns) % 5 == 0 else 0.004  # every fifth is slow: beyond the 80th percentile

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    found = latency.timed(call, 0.5)
    assert found["median_ms"] == pytest.approx(4)
    assert found["p90_ms"] == pytest.approx(12)
    assert found["runs"] == pytest.approx(0.5 / 0.0056, abs=2)  # the mean of the calls
    assert latency.timed(call, 0)["runs"] == latency.LEAST


def test_a_file_in_a_process_of_its_own(onnx_file: Path) -> None:
    found = latency.measure(onnx_file, 8, seconds=0.05)
    assert [(row["batch"], row["threads"]) for row in found["rows"]] == [
        (batch, threads) for threads in sorted({1, usable_cpus()}) for batch in (1, 8)
    ]
    assert all(0 < row["median_ms"] <= row["p90_ms"] for row in found["rows"])
    single, several = (row["median_ms"] for row in found["rows"][:2])
    assert several > single  # eight images take longer than one
    assert 100_000 < found["memory_bytes"] < 10**9


def test_a_broken_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "student.onnx").write_bytes(b"nothing")
    with pytest.raises(
        KtrayError, match=r"latency of 'student.onnx' could not be measured: .*INVALID_PROTOBUF|Protobuf"
    ):
        latency.measure(tmp_path / "student.onnx", 8, seconds=0.05)
