"""Training beside busy programs is measured against the same training alone."""

import pytest

from ktray.jobs.bench import neighbour as module


def state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stream:
            return stream.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def test_busy_programs_run_and_end(monkeypatch):
    started = []
    real = module.subprocess.Popen

    def popen(*arguments):
        started.append(real(*arguments))
        return started[-1]

    monkeypatch.setattr(module.subprocess, "Popen", popen)
    with module.busy_programs(2):
        assert len(started) == 2
        assert all(program.poll() is None for program in started)
    assert all(state(program.pid) == "" for program in started)


@pytest.mark.long
def test_a_row_has_both_rates_and_both_losses(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 32)
    (row,) = module.neighbour(tmp_path, cluster, 1, quick=True)
    assert row.limit_name == "the same alone"
    assert row.ratio > 0
    assert set(row.facts) == {"loss alone", "loss beside them"}
