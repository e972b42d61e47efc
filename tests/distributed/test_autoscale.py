"""Asking for machines: at once where they are there, told while waiting, kept while the job lasts."""

import time

import pytest
import ray
from heard import hearing
from ray._private.state import actors
from ray.util import placement_group_table

from ktray.distributed import autoscale
from ktray.errors import KtrayError
from ktray.recipe.cluster import ClusterConfig


def held():
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def staying():
    return [one for one in actors().values() if one["ActorClassName"] == "_Stay" and one["State"] != "DEAD"]


def soon(true):
    """Whether something comes true: Ray tells of resources and actors a little late."""
    until = time.monotonic() + 30
    while not true() and time.monotonic() < until:
        time.sleep(0.1)
    return true()


def node(name, alive=True, **resources):
    return {"NodeID": name, "Alive": alive, "Resources": resources}


def test_what_is_there_is_not_waited_for_and_is_kept(cluster):
    told = []
    with hearing(told), autoscale.gathered(ClusterConfig()):
        assert staying() == []
    with hearing(told), autoscale.gathered(ClusterConfig(cpus=int(cluster.total_cpus))):
        assert soon(lambda: len(staying()) == 1)
        assert held() == []
        assert soon(lambda: ray.available_resources()["CPU"] == cluster.total_cpus)  # it takes none
    assert soon(lambda: not staying())
    assert told == []


def test_as_many_machines_are_kept_as_the_job_asks_for():
    nodes = [node("head"), node("a", CPU=16.0), node("gone", alive=False, CPU=16.0, GPU=8.0), node("b", CPU=16.0)]
    nodes += [node("c", CPU=16.0, GPU=1.0), node("d", CPU=16.0, GPU=1.0)]
    assert autoscale.wanted(ClusterConfig(), nodes) == []
    assert autoscale.wanted(ClusterConfig(gpus=1), nodes) == ["c"]
    assert autoscale.wanted(ClusterConfig(gpus=2, cpus=48), nodes) == ["c", "d", "a"]
    assert autoscale.wanted(ClusterConfig(cpus=16), nodes[:4]) == ["a"]
    assert autoscale.wanted(ClusterConfig(cpus=640), nodes) == ["c", "d", "a", "b"]  # what there is


def test_what_does_not_come_is_told_and_let_go_of(cluster):
    told = []
    with (
        pytest.raises(KtrayError, match=r"has 2 CPUs and 0 GPUs after 0.5 s, .* requests 64 CPUs and 1 GPUs"),
        hearing(told),
        autoscale.gathered(ClusterConfig(cpus=64, gpus=1, wait_seconds=0.5)),
    ):
        raise AssertionError("it was not there")
    assert told == ["cluster   waiting for 64 CPUs and 1 GPUs; the cluster has 2 CPUs and 0 GPUs"]
    assert held() == []


def test_the_autoscaler_sees_the_demand_and_the_job_goes_on_when_it_is_met(cluster, monkeypatch):
    real, seen = ray.cluster_resources, []

    def grown():
        seen.append(held())
        return {**real(), "GPU": 2.0} if len(seen) > 6 else real()

    at_the_end = []

    def remove(group, real=ray.util.remove_placement_group):
        at_the_end.append([one["State"] for one in staying()])
        real(group)

    monkeypatch.setattr(ray, "cluster_resources", grown)
    monkeypatch.setattr(ray.util, "remove_placement_group", remove)
    began = time.monotonic()
    with autoscale.gathered(ClusterConfig(cpus=1, gpus=2, wait_seconds=60)):
        assert time.monotonic() - began < 30
    bundles = [group["bundles"] for groups in seen for group in groups]
    assert bundles
    assert sum(bundle.get("GPU", 0) for bundle in bundles[-1].values()) == 2
    assert held() == []
    assert at_the_end == [["ALIVE"]]  # else the machine, idle since it came up, might go with the group
