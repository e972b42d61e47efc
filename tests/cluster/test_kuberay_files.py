"""The Kubernetes manifests as kustomize resolves them. KubeRay's own schema is too large to keep here."""

import re
import shutil
from pathlib import Path

import pytest
import ray
import yaml
from kustomization import build, containers

KUBERAY = Path(__file__).resolve().parents[2] / "cluster" / "kuberay"
FOLDERS = ("base", "session", "overlays/cpu-demo", "overlays/gpu")
BYTES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def one_of(objects, kind):
    (found,) = [one for one in objects if one["kind"] == kind]
    return found


def cluster_of(objects):
    """The cluster's spec, in a job or by itself."""
    ray_object = next(one for one in objects if one["kind"] in ("RayJob", "RayCluster"))
    return ray_object["spec"].get("rayClusterSpec", ray_object["spec"])


def pods(cluster):
    """(group's name, pod template) of the head and of each group."""
    groups = [(group["groupName"], group["template"]) for group in cluster["workerGroupSpecs"]]
    return [("head", cluster["headGroupSpec"]["template"]), *groups]


def faults(objects):
    """What an administrator would send back."""
    cluster = cluster_of(objects)
    head = cluster["headGroupSpec"]
    found = []
    if cluster.get("authOptions") != {"mode": "token"}:
        found.append("no token authentication")
    if head["rayStartParams"].get("num-cpus") != "0":
        found.append("work on the head")
    if head.get("serviceType") != "ClusterIP":
        found.append("head reachable from outside")
    if cluster["rayVersion"] != ray.__version__:
        found.append("another version of Ray")
    names = {(one["kind"], one["metadata"]["name"]) for one in objects}
    for name, template in pods(cluster):
        pod = template["spec"]
        if not pod["securityContext"]["runAsNonRoot"] or pod["securityContext"]["runAsUser"] != 1000:
            found.append(f"{name}: runs as another user than the image's")
        if template["metadata"]["labels"] != {"app.kubernetes.io/part-of": "ktray"}:
            found.append(f"{name}: outside of the network policy")
        for kind, key in (("ServiceAccount", "serviceAccountName"), ("PriorityClass", "priorityClassName")):
            if (kind, pod[key]) not in names:
                found.append(f"{name}: {kind} {pod[key]} is not made")
        for volume in pod.get("volumes", []):
            if ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) not in names:
                found.append(f"{name}: volume {volume['name']} is not made")
        if pod["restartPolicy"] != "Never":
            found.append(f"{name}: pods are restarted beside the autoscaler")
        if not {"readinessProbe", "livenessProbe"} <= set(pod["containers"][0]):
            found.append(f"{name}: no probes")
    for container in containers(objects):
        name = container["name"]
        if not re.fullmatch(r"[^@\s]+@sha256:[0-9a-f]{64}", container["image"]):
            found.append(f"{name}: image is not pinned")
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        if requests["memory"] != limits["memory"]:
            found.append(f"{name}: memory is promised that may not be there")
        if container["securityContext"]["allowPrivilegeEscalation"]:
            found.append(f"{name}: may gain rights")
        found += [f"{name}: {env['name']} inline" for env in container.get("env", []) if secret(env)]
    return found


def secret(env):
    return bool(re.search("token|secret|password|key", env["name"], re.I)) and "value" in env


@pytest.mark.parametrize("folder", FOLDERS)
def test_manifests_hold_what_they_promise(folder):
    objects = build(KUBERAY / folder)
    assert faults(objects) == []
    assert "Secret" not in {one["kind"] for one in objects}
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(names) == len(set(names))
    wanted = {"ktray", None}
    assert {one["metadata"].get("namespace") for one in objects} == wanted  # None: the priority classes


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("authOptions", None, "no token authentication"),
        ("headGroupSpec/rayStartParams/num-cpus", "4", "work on the head"),
        ("headGroupSpec/serviceType", "LoadBalancer", "head reachable from outside"),
        ("headGroupSpec/template/spec/serviceAccountName", "x", "head: ServiceAccount x is not made"),
        ("workerGroupSpecs/0/template/spec/securityContext/runAsUser", 0, "cpu: runs as another user than the image's"),
        ("workerGroupSpecs/1/template/spec/containers/0/image", "ktray:latest", "ray-worker: image is not pinned"),
        (
            "workerGroupSpecs/0/template/spec/containers/0/resources/limits/memory",
            "99Gi",
            "ray-worker: memory is promised that may not be there",
        ),
        (
            "workerGroupSpecs/0/template/spec/containers/0/env",
            [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}],
            "ray-worker: AWS_SECRET_ACCESS_KEY inline",
        ),
    ],
)
def test_a_fault_is_found(path, value, fault):
    objects = build(KUBERAY / "base")
    *parents, last = path.split("/")
    place = cluster_of(objects)
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    place[last] = value
    assert faults(objects) == [fault]


def test_the_session_and_the_job_have_the_same_cluster():
    session, job = cluster_of(build(KUBERAY / "session")), cluster_of(build(KUBERAY / "base"))
    for cluster in (session, job):
        # A job's cluster costs nothing after it; one that stays starts without workers.
        cluster["workerGroupSpecs"][0].pop("replicas")
        cluster["workerGroupSpecs"][0].pop("minReplicas")
    assert session == job
    job["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] = "5"
    assert session != job
    groups = cluster_of(build(KUBERAY / "session"))["workerGroupSpecs"]
    assert [group["minReplicas"] for group in groups] == [0, 0, 0]


def test_autoscaling_from_spot_to_on_demand():
    cluster = cluster_of(build(KUBERAY / "base"))
    assert cluster["enableInTreeAutoscaling"] is True
    options = cluster["autoscalerOptions"]
    assert options["version"] == "v2"
    assert options["idleTimeoutSeconds"] >= 300
    cpu, spot, on_demand = cluster["workerGroupSpecs"]
    assert cpu["priority"] > spot["priority"] > on_demand["priority"]
    assert "spot" in spot["template"]["spec"]["nodeSelector"].values()
    assert "on-demand" in on_demand["template"]["spec"]["nodeSelector"].values()
    # Ray itself reads the wait after which a pending pod counts as unavailable, from this very name.
    from ray.autoscaler.v2.instance_manager import config

    (env,) = options["env"]
    assert env["name"] in Path(config.__file__).read_text()
    assert 0 < int(env["value"]) < one_of(build(KUBERAY / "base"), "RayJob")["spec"]["preRunningDeadlineSeconds"]


@pytest.mark.parametrize("folder", ["overlays/cpu-demo", "overlays/gpu"])
def test_a_job_ends_and_takes_its_cluster_along(folder):
    spec = one_of(build(KUBERAY / folder), "RayJob")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] <= 3600
    assert spec["activeDeadlineSeconds"] <= 86400
    assert 0 < spec["backoffLimit"] <= 3
    assert "entrypointNumCpus" not in spec  # the head offers none: it would wait for ever
    arguments = spec["entrypoint"].split()
    assert arguments[:2] == ["python", "/opt/ktray/jobs/distill.py"]

    from ktray import recipe as recipes

    recipes.load([], [one.replace("CHANGE-ME", "bucket") for one in arguments[2:]])  # raises for an unknown key
    workers = int(dict(one.split("=") for one in arguments[2:])["cluster.workers"])
    ready = {group["groupName"]: group["minReplicas"] for group in spec["rayClusterSpec"]["workerGroupSpecs"]}
    assert ready["gpu-spot" if "gpu" in folder else "cpu"] == workers


def test_the_demo_needs_no_gpu_and_keeps_its_store_on_a_volume():
    objects = build(KUBERAY / "overlays/cpu-demo")
    assert "gpu" not in yaml.safe_dump(cluster_of(objects))
    for _, template in pods(cluster_of(objects)):
        assert template["spec"]["containers"][0]["volumeMounts"] == [{"name": "store", "mountPath": "/store"}]
    needed = sum(
        int(one["resources"]["requests"]["memory"][:-2]) * BYTES[one["resources"]["requests"]["memory"][-2:]]
        for one in containers(pods(cluster_of(objects)))
    )
    assert needed <= 12 * 2**30


def test_the_job_for_gpus_reads_its_store_by_a_role():
    accounts = [one for one in build(KUBERAY / "overlays/gpu") if one["kind"] == "ServiceAccount"]
    assert len(accounts) == 2
    for account in accounts:
        assert account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].startswith("arn:aws:iam::")


@pytest.mark.parametrize(("overlay", "workers"), [("cpu-demo", {"cpu": 2}), ("gpu", {"cpu": 1, "gpu-spot": 2})])
def test_a_queue_of_kueue_takes_a_cluster_of_fixed_size(tmp_path, overlay, workers):
    """As the comment in the overlay says: its last lines without their first two characters."""
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    folder = tmp_path / "kuberay" / "overlays" / overlay
    settings = folder / "kustomization.yaml"
    text, before = settings.read_text(), build(folder)
    *kept, components, entry = text.splitlines()
    settings.write_text("\n".join([*kept, components[2:], entry[2:]]))
    objects = build(folder)
    assert faults(objects) == []
    job, plain = one_of(objects, "RayJob"), one_of(before, "RayJob")
    assert job["metadata"].pop("labels") == {"kueue.x-k8s.io/queue-name": "CHANGE-ME"}
    assert job["spec"]["shutdownAfterJobFinishes"] is True  # the quota is given back at the end
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster.pop("enableInTreeAutoscaling") is False
    assert {
        group["groupName"]: group["replicas"] for group in cluster["workerGroupSpecs"] if group["replicas"]
    } == workers
    assert len(cluster["workerGroupSpecs"]) <= 7  # with the head, a workload of Kueue has at most 8 sets of pods
    assert plain["spec"]["rayClusterSpec"].pop("enableInTreeAutoscaling") is True
    assert plain["spec"]["rayClusterSpec"].pop("autoscalerOptions")
    assert job == plain
    others = [one for one in objects if one["kind"] != "RayJob"]
    assert others == [one for one in before if one["kind"] != "RayJob"]


def test_network_policy_lets_in_only_ktray_and_the_operator():
    policy = one_of(build(KUBERAY / "base"), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    own, operator = policy["ingress"]
    assert own["from"] == [{"podSelector": policy["podSelector"]}]
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    submitter = one_of(build(KUBERAY / "base"), "RayJob")["spec"]["submitterPodTemplate"]
    assert submitter["metadata"]["labels"] == policy["podSelector"]["matchLabels"]
