"""The doctor: it runs all checks of a recipe on the cluster that Ray is connected to."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from ktray.accounting.device import versions
from ktray.distributed.allocation import cluster_allocation
from ktray.distributed.connect import connect
from ktray.distributed.doctor import checks
from ktray.distributed.doctor.checks import DoctorCheck
from ktray.distributed.doctor.pairs import meet, pairs
from ktray.distributed.doctor.probe import ProbeRequest, clock, probe
from ktray.distributed.nodes import SECONDS, on_node, on_nodes
from ktray.distributed.ray_internals import dashboard_address
from ktray.errors import KtrayError, ResourceError
from ktray.recipe.schema import Recipe
from ktray.redact import scrub
from ktray.storage.store import Store

logger = logging.getLogger("ktray")


def examine(recipe: Recipe, quick: bool = False) -> Iterator[DoctorCheck]:
    """Run the checks. Yields each result as soon as it is there.

    Args:
        quick: run only checks that take about a second once processes run: no all-reduce, no decoding, no MLflow.
    """
    import ray

    nodes = {n["NodeID"]: n for n in ray.nodes() if n["Alive"]}
    names = tuple(path for path in (recipe.teacher.checkpoint, recipe.student.checkpoint) if path)
    store, token = Store(recipe.store), f".doctor-{uuid.uuid4().hex[:8]}"
    try:
        store.write(f"{token}/driver", b"driver")
    except (OSError, KtrayError) as error:
        yield DoctorCheck(
            "store", "FAIL", f"the driver cannot write to {recipe.store}: {error}", "Check the address and the rights."
        )
        return
    try:
        request = ProbeRequest(store.uri, token, names, decode=not quick)
        probes, lost = on_nodes(nodes, lambda node: on_node(probe, node).remote(request, node))
        hosts = {node: report["host"] for node, report in probes.items()}
        missing = [hosts[node] for node in probes if not store.exists(f"{token}/{node}")]
    finally:
        store.delete(token)
    for node, why in lost.items():
        where = nodes[node]["NodeManagerAddress"]
        yield DoctorCheck(
            "nodes", "FAIL", f"{where} cannot run tasks: {why}", "See its logs under /tmp/ray/session_latest/logs."
        )
    if not probes:
        return
    yield checks.versions_alike(versions(), probes)
    yield checks.store_shared(recipe.store, probes, missing)
    yield checks.files_there(probes, names)
    yield checks.gpus_seen(probes, {node: nodes[node]["Resources"].get("GPU", 0.0) for node in probes})
    yield checks.clocks_agree(_skews(list(probes)), hosts)
    try:
        part = recipe.cluster
        yield DoctorCheck("plan", "ok", cluster_allocation(part.span, part.use_gpu, part.jobs).line.split(None, 1)[1])
    except KtrayError as error:
        yield DoctorCheck("plan", "FAIL", error.what, error.remedy)
    if quick:
        return
    yield checks.decodes_fast(probes)
    workers, gpus = trainers(nodes, probes, recipe.cluster.use_gpu)
    tried = pairs(workers, every=len(workers) <= 8) or [(node, node) for node in workers[:1] if not gpus]
    failures = [(hosts[a], hosts[b], cause) for a, b in tried if (cause := meet(a, b, on_node, gpus))]
    yield checks.network(failures, len(tried))
    yield checks.guarded(_dashboard())
    yield _mlflow(recipe)


def trainers(
    nodes: Mapping[str, Mapping[str, Any]], probes: checks.Probes, use_gpu: bool | str
) -> tuple[list[str], bool]:
    """The nodes that would train together, and whether they would train on GPUs.

    They are the nodes with GPUs that torch sees, or, if there are none, all nodes with CPUs.
    """
    with_gpus = [node for node in probes if nodes[node]["Resources"].get("GPU") and probes[node]["gpus"]]
    if with_gpus and use_gpu:
        return with_gpus, True
    return [node for node in probes if nodes[node]["Resources"].get("CPU")], False


def require(recipe: Recipe) -> None:
    """Run the quick checks before a job on several nodes; on a single node, do nothing.

    Raises:
        KtrayError: a check failed.
    """
    import ray

    if sum(1 for node in ray.nodes() if node["Alive"]) < 2:
        return
    for check in examine(recipe, quick=True):
        if check.state == "FAIL":
            raise ResourceError(f"{check.name}: {check.found}", check.remedy)
        if check.state == "warn":
            logger.info(f"doctor    {check.line}")


def show(recipe: Recipe, debug: bool = False) -> None:
    """Run all checks and print their results.

    Raises:
        KtrayError: at least one check failed.
    """
    connect(debug)
    failed = []
    for check in examine(recipe):
        logger.info(check.line)
        if check.state == "FAIL":
            failed.append(check.name)
    if failed:
        raise ResourceError(
            f"{len(failed)} check(s) failed: {', '.join(failed)}", "Each line above says what to change."
        )


def _skews(nodes: list[str]) -> dict[str, tuple[float, float]]:
    """For each node, how many seconds its clock is ahead, and half of the time that the request took."""
    import ray

    skews = {}
    for node in nodes:
        remote_clock = on_node(clock, node)
        ray.get(remote_clock.remote(), timeout=SECONDS)  # starts a process on the node
        before = time.time()
        node_time = ray.get(remote_clock.remote(), timeout=SECONDS)
        after = time.time()
        skews[node] = node_time - (before + after) / 2, (after - before) / 2
    return skews


def _dashboard() -> str | None:
    address = dashboard_address()
    return f"http://{address}" if address else None


def _mlflow(recipe: Recipe) -> DoctorCheck:
    import mlflow

    uri = str(recipe.mlflow.uri or mlflow.get_tracking_uri())
    shown = str(scrub(uri))
    if not uri.startswith(("http://", "https://")):
        return DoctorCheck("MLflow", "ok", "a database in the store")
    try:
        mlflow.MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:
        why = str(scrub(" ".join(str(error).split())))[:200]  # the error repeats the address with its credentials
        return DoctorCheck(
            "MLflow", "FAIL", f"{shown}: {why}", "Check that the server is up and its credentials are set."
        )
    return DoctorCheck("MLflow", "ok", shown)
