"""The files for clouds and the image: what Ray's own validator says, and the promises of cluster/README.md."""

import copy
import fnmatch
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest

from ktray.bootstrap import LOCK, install_steps
from ktray.distributed.autoscale import bundles
from ktray.recipe.cluster import ClusterConfig

ROOT = Path(__file__).resolve().parents[2]
CLOUDS = ("aws", "gcp")
LOCK_GCP = "requirements/constraints-gcp.txt"
DIGEST = re.compile(r"^\S+@sha256:[0-9a-f]{64}$")


def config(cloud):
    return yaml.safe_load((ROOT / "cluster" / f"{cloud}.yaml").read_text())


def valid(raw):
    """As `ray up` checks it, short of asking the cloud."""
    prepared = prepare_config(copy.deepcopy(raw))
    validate_config(prepared)
    return prepared


def start_commands(raw):
    commands = raw["head_start_ray_commands"] + raw["worker_start_ray_commands"]
    return [one for one in commands if "ray start" in one]


def open_commands(raw):
    """Start commands without token authentication, or heads whose dashboard others can reach."""
    return [
        one
        for one in start_commands(raw)
        if not one.startswith("RAY_AUTH_MODE=token ray start")
        or ("--head" in one and "--dashboard-host=127.0.0.1" not in one)
    ]


# ---------------------------------------------------------------------------------------------- ray up


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_accepts_the_file_and_installs_nothing(cloud):
    prepared = valid(config(cloud))
    assert prepared["head_setup_commands"] == prepared["worker_setup_commands"] == []  # else Ray's defaults run


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_refuses_mistakes(cloud):
    raw = config(cloud)
    for break_it, error in (
        (lambda c: c.update(idle_minutes=5), jsonschema.ValidationError),
        (lambda c: c["docker"].update(imagee="x"), jsonschema.ValidationError),
        (lambda c: c["available_node_types"]["cpu"].update(resources={"CPU": -1}), jsonschema.ValidationError),
        (lambda c: c.update(head_node_type="nobody"), ValueError),
        (lambda c: c["available_node_types"]["cpu"].update(min_workers=99), ValueError),
    ):
        broken = copy.deepcopy(raw)
        break_it(broken)
        with pytest.raises(error):
            valid(broken)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_token_authentication_and_loopback_dashboard_in_every_start_command(cloud):
    raw = config(cloud)
    assert len(start_commands(raw)) == 2
    assert open_commands(raw) == []
    for old, new in (("127.0.0.1", "0.0.0.0"), ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled")):
        broken = copy.deepcopy(raw)
        broken["head_start_ray_commands"] = [one.replace(old, new) for one in raw["head_start_ray_commands"]]
        assert len(open_commands(broken)) == 1
    assert raw["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("cloud", CLOUDS)
def test_groups(cloud):
    raw = config(cloud)
    groups = raw["available_node_types"]
    assert raw["head_node_type"] == "head"
    assert groups["head"]["resources"] == {"CPU": 0}
    workers = {name: group for name, group in groups.items() if name != "head"}
    assert all(group["min_workers"] == 0 < group["max_workers"] for group in workers.values())
    assert raw["max_workers"] == sum(group["max_workers"] for group in workers.values())
    assert 0 < raw["idle_timeout_minutes"] <= 15
    assert DIGEST.match(raw["docker"]["image"])
    spot, fallback = groups["gpu_spot"], groups["gpu_on_demand"]
    assert spot["resources"] == fallback["resources"]
    assert spot["priority"] > fallback["priority"]
    # The fallback is the same machine, on demand.
    market = {"aws": "InstanceMarketOptions", "gcp": "scheduling"}[cloud]
    same = [{k: v for k, v in group["node_config"].items() if k != market} for group in (spot, fallback)]
    assert same[0] == same[1]
    assert "spot" in str(spot["node_config"][market]).lower()
    on_demand = [group for name, group in groups.items() if name != "gpu_spot"]
    assert not any("spot" in str(group["node_config"].get(market, "")).lower() for group in on_demand)


@pytest.mark.parametrize(
    ("cloud", "cpus", "gpus", "started"),
    [
        ("aws", 48, 2, {"gpu_spot": 2, "cpu": 1}),  # as in the README
        ("gcp", 32, 2, {"gpu_spot": 2, "cpu": 1}),
        ("aws", 16, 0, {"cpu": 1}),
        ("aws", 0, 9, {"gpu_spot": 8, "gpu_on_demand": 1}),
        ("aws", 1000, 0, {}),  # more than max_workers: none, and the job says so after its time
    ],
)
def test_which_machines_the_autoscaler_starts_for_what_a_job_asks(cloud, cpus, gpus, started):
    settings = AutoscalingConfig(valid(config(cloud)), skip_content_hash=True)
    asked = [ResourceRequestUtil.make(one) for one in bundles(ClusterConfig(cpus=cpus, gpus=gpus))]
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=settings.get_node_type_configs(),
        max_num_nodes=settings.get_max_num_nodes(),
        gang_resource_requests=[GangResourceRequest(requests=asked)],
    )
    found = ResourceDemandScheduler(None).schedule(request)
    assert {one.instance_type: one.count for one in found.to_launch} == started


def test_roles_instead_of_keys():
    for name, group in config("aws")["available_node_types"].items():
        role = "ktray-head" if name == "head" else "ktray-worker"
        assert group["node_config"]["IamInstanceProfile"] == {"Name": role}
        assert group["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
    for name, group in config("gcp")["available_node_types"].items():
        assert name == "head" or group["node_config"]["serviceAccounts"][0]["email"].startswith("ktray-worker@")
    assert config("aws")["provider"]["cache_stopped_nodes"] is False


def test_the_access_template_makes_what_aws_yaml_names():
    class Loader(yaml.SafeLoader):
        """Takes CloudFormation's functions for what they are given."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: {suffix: node.value})
    made = yaml.load((ROOT / "cluster/aws-access.yaml").read_text(), Loader)["Resources"].values()
    profiles = {one["Properties"]["InstanceProfileName"] for one in made if one["Type"] == "AWS::IAM::InstanceProfile"}
    groups = [one["Properties"] for one in made if one["Type"] == "AWS::EC2::SecurityGroup"]
    raw = config("aws")
    assert profiles == {"ktray-head", "ktray-worker"}
    assert [group["GroupName"] for group in groups] == [raw["provider"]["security_group"]["GroupName"]]
    # The right to end machines is bound to this cluster's name.
    statements = str([one for one in made if one["Type"] == "AWS::IAM::Role"])
    assert f"'ec2:ResourceTag/ray-cluster-name': '{raw['cluster_name']}'" in statements
    assert "0.0.0.0/0" not in str(groups)


def test_no_secret_in_any_file():
    pattern = re.compile(
        r"AKIA[0-9A-Z]{16}|-----BEGIN|(?:secret|password|auth_token|secret_access_key)\"?\s*[:=]\s*[\"']?\w{8,}", re.I
    )
    assert pattern.search("AWS_SECRET_ACCESS_KEY: abcdefgh12")
    assert pattern.search("auth_token=0123456789abcdef")
    files = [path for path in (ROOT / "cluster").rglob("*") if path.is_file()] + [ROOT / "Dockerfile"]
    files = [path for path in files if path.name != ".env"]  # of a running cluster/local/; git passes it over
    assert [path.name for path in files if pattern.search(path.read_text())] == []


# ------------------------------------------------------------------------------------------------ image


def instructions():
    """(instruction, rest) of the Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def ignored(path, patterns):
    """Whether .dockerignore leaves ``path`` out: the last pattern that matches it or a folder above it decides."""
    verdict = False
    parts = Path(path).parts
    for pattern in patterns:
        glob = pattern.lstrip("!")
        for depth, name in enumerate(parts, start=1):
            anywhere = glob.startswith("**/") and fnmatch.fnmatchcase(name, glob[3:])
            here = glob.count("/") == depth - 1 and fnmatch.fnmatchcase("/".join(parts[:depth]), glob)
            if anywhere or here:
                verdict = not pattern.startswith("!")
    return verdict


def ignore_patterns():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_image_is_built_in_stages_from_a_chosen_base_for_a_user_without_rights():
    found = instructions()
    froms = [rest for word, rest in found if word == "FROM"]
    assert froms == ["${BASE_IMAGE} AS base", "base AS builder", "base"]
    assert found[0][0] == "ARG"
    assert found[0][1].startswith("BASE_IMAGE=nvidia/cuda:")
    users = [rest for word, rest in found if word == "USER"]
    assert users == ["1000:1000"]  # a number: Kubernetes cannot tell whether a name is root
    after = [word for word, _ in found[found.index(("USER", "1000:1000")) :]]
    assert not {"RUN", "COPY", "USER"} & set(after[1:])
    assert "ENTRYPOINT" not in dict(found)  # `ray up` and KubeRay bring their own commands


def test_image_uses_nothing_that_some_builders_refuse():
    text = (ROOT / "Dockerfile").read_text()
    assert not re.search(r"^#\s*(syntax|escape|check)\s*=", text, re.M | re.I)
    assert "<<" not in text
    # A comment between continued lines, an instruction from the net.
    assert not re.search(r"\\\n\s*#", text)
    assert "ADD" not in dict(instructions())


def test_image_installs_the_lock_as_bootstrap_does():
    runs = [rest for word, rest in instructions() if word == "RUN"]
    (packages,) = [rest for rest in runs if "constraints.txt" in rest]
    (_, locked), (_, itself) = install_steps(ROOT, dev=False, use_lock=True)
    for word in locked:
        assert (f"/tmp/{word}" if word.endswith(".txt") else word) in packages.split()
    (own,) = [rest for rest in runs if "-e ." in rest]
    assert set(itself) <= set(own.split())
    assert not any("pip install" in rest for rest in runs if rest not in (packages, own))
    secrets = re.findall(r"--mount=type=secret,id=(\w+)", packages)
    assert secrets == ["ca", "pipconf"]
    assert "required" not in packages  # both are optional


def test_lock_for_google_cloud_adds_to_the_lock_and_contradicts_nothing():
    pins = {
        name: dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (ROOT / name).read_text(), re.M))
        for name in (LOCK, LOCK_GCP)
    }
    assert "google-api-python-client" in pins[LOCK_GCP]
    assert not set(pins[LOCK_GCP]) & set(pins[LOCK])
    text = (ROOT / LOCK_GCP).read_text()
    assert text.count("--hash=sha256:") >= len(pins[LOCK_GCP])
    assert "://" not in text


def test_what_the_image_copies_is_there_and_not_ignored():
    patterns = ignore_patterns()
    copied = []
    for word, rest in instructions():
        if word == "COPY" and "--from=" not in rest:
            copied += rest.split()[:-1]
    assert {LOCK, LOCK_GCP, "ktray", "jobs"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not ignored(source, patterns), source
        inside = [path for path in (ROOT / source).rglob("*.yaml") if path.is_file()]
        assert not any(ignored(path.relative_to(ROOT), patterns) for path in inside)
    assert ignored("requirements/constraints-dev.txt", patterns)  # a change of it builds no new layers
    for private in (".git/config", ".env", "ktray-store/mlflow.db", "photos/a.jpg", "ktray/__pycache__/a.pyc"):
        assert ignored(private, patterns), private
    assert ignored("ktray", [one for one in patterns if one != "!ktray"])


def test_image_settings():
    found = instructions()
    settings = dict(re.findall(r"(\w+)=(\S+)", next(rest for word, rest in found if word == "ENV")))
    assert settings["RAY_AUTH_MODE"] == "token"
    assert settings["HOME"] == "/home/ktray"  # `ray up` reads it from here
    assert settings["PATH"].startswith("/opt/venv/bin:")
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT as PORT

    health = dict(found)["HEALTHCHECK"]
    assert f"http://localhost:{PORT}/api/local_raylet_healthz" in health
    from ray.dashboard import http_server_agent

    # The agent answers it without a token.
    assert '"/api/local_raylet_healthz"' in Path(http_server_agent.__file__).read_text()
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', dict(found)["LABEL"]))
    project = dict(re.findall(r'^(name|version|license) = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M))
    assert labels["title"] == project["name"]
    assert labels["version"] == project["version"]
    assert labels["licenses"] == project["license"]
