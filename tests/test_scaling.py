"""Asking for machines: at once where they are there, told while waiting, let go of in the end."""

import time

import pytest
import ray
from ray.util import placement_group_table

from ktray import scaling
from ktray.errors import KtrayError
from ktray.recipe import Cluster


def held():
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def test_what_is_there_is_not_waited_for(cluster):
    told = []
    scaling.gather(Cluster(), told.append)
    scaling.gather(Cluster(cpus=int(cluster.total_cpus)), told.append)
    assert told == []
    assert held() == []


def test_what_does_not_come_is_told_and_let_go_of(cluster):
    told = []
    with pytest.raises(KtrayError, match=r"has 2 CPUs and 0 GPUs after 0.5 s, .* asks for 64 CPUs and 1 GPUs"):
        scaling.gather(Cluster(cpus=64, gpus=1, wait_seconds=0.5), told.append)
    assert told == ["cluster   waiting for 64 CPUs and 1 GPUs; there are 2 CPUs and 0 GPUs"]
    assert held() == []


def test_the_autoscaler_sees_the_demand_and_the_job_goes_on_when_it_is_met(cluster, monkeypatch):
    real, seen = ray.cluster_resources, []

    def grown():
        seen.append(held())
        return {**real(), "GPU": 2.0} if len(seen) > 6 else real()

    monkeypatch.setattr(ray, "cluster_resources", grown)
    began = time.monotonic()
    scaling.gather(Cluster(gpus=2, wait_seconds=60), print)
    assert time.monotonic() - began < 30
    bundles = [group["bundles"] for groups in seen for group in groups]
    assert bundles
    assert sum(bundle.get("GPU", 0) for bundle in bundles[-1].values()) == 2
    assert held() == []
