"""What stages hold on a cluster: this machine for real, and other clusters as Ray would describe them."""

from types import SimpleNamespace

import pytest
import ray
from heard import hearing

from ktray.accounting.device import describe_device
from ktray.accounting.held import Held
from ktray.accounting.prices import hourly_price
from ktray.distributed import machines as module
from ktray.distributed.allocation import allocate
from ktray.distributed.machines import ClusterMachines

PRICES = {"cheap": 0.36, "dear": 0.72, "cpu_core": 0.1}


def test_one_machine_is_described_without_a_task(cluster, monkeypatch):
    monkeypatch.setattr(module, "on_node", None)
    (node,) = [n["NodeID"] for n in ray.nodes() if n["Alive"]]
    found = ClusterMachines(cluster, {})
    price = hourly_price(describe_device(), {})
    assert found.cluster() == found.workers([node, node]) == Held(1.0, price)
    assert found.some(0.5) == Held(0.5, price / 2)


def node(name, cpus, gpus=0.0, alive=True):
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus} if cpus else {}}


@pytest.fixture
def nodes(monkeypatch):
    """A head without work, two machines of other types, and one that has left; the second answers nothing at first."""
    there = [node("head", 0), node("a", 2.0), node("b", 2.0), node("gone", 2.0, alive=False)]
    types, asked = {"a": "cheap", "b": "dear"}, []

    def answers(names, start):
        asked.append(list(names))
        known = {n: {"cores": 2, "gpus": [], "instance": types[n]} for n in names if n in types}
        return known, {n: "no answer" for n in names if n not in types}

    monkeypatch.setattr(module, "on_nodes", answers)
    monkeypatch.setattr(ray, "nodes", lambda: there)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    return SimpleNamespace(there=there, types=types, asked=asked)


def test_machines_that_work_are_paid_at_their_own_prices(nodes):
    found = ClusterMachines(allocate(4, 0, 2, 1, False), PRICES)
    assert found.cluster() == Held(2.0, pytest.approx(1.08))
    assert found.workers(["b"]) == Held(1.0, 0.72)
    assert found.workers(["a", "b", "b"]) == Held(2.0, pytest.approx(1.08))
    assert nodes.asked == [["a", "b"]]  # each once, and the head not at all
    nodes.there.append(node("late", 2.0))
    nodes.types["late"] = "cheap"
    assert found.workers(["late"]) == Held(1.0, 0.36)
    assert nodes.asked[1:] == [["late"]]


def test_a_machine_that_does_not_answer_is_told(nodes, monkeypatch):
    monkeypatch.setattr(module, "describe_device", lambda: {"cores": 4, "gpus": []})
    del nodes.types["b"]
    said: list[str] = []
    with hearing(said):
        found = ClusterMachines(allocate(4, 0, 2, 1, False), PRICES)
        assert found.cluster() == Held(2.0, pytest.approx(0.36 + 0.4))
    assert "1 of 2 machines did not say what they are (no answer)" in said[0]
