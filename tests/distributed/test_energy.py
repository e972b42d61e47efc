"""The energy of a cluster, from counters of its nodes."""

import pytest
import ray

from ktray.distributed import energy


def node(name, gpus, alive=True):
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": 2.0, "GPU": gpus} if gpus else {"CPU": 2.0}}


@pytest.fixture
def counters(monkeypatch):
    """Three nodes, two of them with GPUs, and the joules that each would answer; it counts the requests."""
    there = [node("head", 0), node("a", 1.0), node("b", 2.0)]
    joules: dict[str, float | None] = {"a": 1_000.0, "b": 5_000.0}
    asked: list[list[str]] = []

    def answers(names, start, seconds):
        asked.append(list(names))
        return {n: joules[n] for n in names if n in joules}, {n: "no answer" for n in names if n not in joules}

    monkeypatch.setattr(energy, "on_nodes", answers)
    monkeypatch.setattr(ray, "nodes", lambda: there)
    return there, joules, asked


def test_all_nodes_with_gpus_count_and_are_asked_now_and_then(counters):
    there, joules, asked = counters
    now = [0.0]
    read = energy.cluster_joules(lambda: now[0])
    assert read() == 0.0
    joules.update(a=1_300.0, b=5_500.0)
    assert read() == 0.0  # too early to ask again
    now[0] = 20.0
    assert read() == 300.0 + 500.0
    assert asked == [["a", "b"]] * 2
    joules["late"] = 70.0
    there.append(node("late", 1.0))
    del joules["a"]  # it does not answer, and what it used stays
    joules["b"] = 6_000.0
    now[0] = 40.0
    assert read() == 300.0 + 1_000.0
    joules["late"] = 100.0
    now[0] = 60.0
    assert read() == 300.0 + 1_000.0 + 30.0


def test_without_a_counter_there_is_no_energy(counters):
    _, joules, _ = counters
    joules.update(a=None, b=None)
    assert energy.cluster_joules() is None
