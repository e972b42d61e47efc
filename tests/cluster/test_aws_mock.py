"""`ray up`, workers and `ray down` of cluster/aws.yaml on a mock of EC2, with the roles of cluster/aws-access.yaml.
Machines are entries of the mock: what Ray runs on them by SSH is written down, answered as Docker would, and not run.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler.v2.instance_manager.config import FileConfigReader
from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter
from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
from ray.core.generated.instance_manager_pb2 import Instance

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"AWS_ACCESS_KEY_ID": "mock", "AWS_SECRET_ACCESS_KEY": "mock", "AWS_DEFAULT_REGION": "us-east-1"}
IMAGE = "registry.example.com/ktray@sha256:" + "1" * 64
SSH = r"""#!/bin/sh
for word; do case "$word" in ubuntu@*) log="$SHIM/${word#ubuntu@}"; break;; esac; done
case "$*" in
*"command -v docker"*) echo /usr/bin/docker;;
*State.Running*) grep -qs "docker run" "$log" && echo true;;
*Config.Env*) echo '["HOME=/home/ktray"]';;
*"printenv HOME"*) echo /home/ktray;;
esac
echo "$*" >> "$log"
"""
RSYNC = r"""#!/bin/sh
for word; do source="$target"; target="$word"; done
target="$SHIM/files/${target#*:}"
mkdir -p "$(dirname "$target")" && cp -r "$source" "$target"
"""


@dataclass
class Cloud:
    """The mock (a client of EC2), and a home folder from which `ray` is called."""

    ec2: object
    home: Path

    def ray(self, *words):
        command = [str(Path(sys.executable).with_name("ray")), *words, "--yes", str(self.home / "aws.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def machines(self):
        """That are not ended, by group."""
        found = {}
        for reservation in self.ec2.describe_instances()["Reservations"]:
            for one in reservation["Instances"]:
                tags = {tag["Key"]: tag["Value"] for tag in one["Tags"]}
                if one["State"]["Name"] in ("pending", "running"):
                    assert tags["ray-cluster-name"] == "ktray"  # else the head's role could not end it
                    found.setdefault(tags["ray-user-node-type"], []).append({**one, "Tags": tags})
        return found

    def commands(self, address):
        """What was run there."""
        return (self.home / "shim" / address).read_text()

    def copied(self, name):
        """Of the files that were copied to machines, those of this name."""
        return [path for path in (self.home / "shim/files").rglob(name) if path.is_file()]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "shim").mkdir()
    for name, text in (("ssh", SSH), ("rsync", RSYNC)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("a" * 64)
    raw = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text())
    raw["docker"]["image"] = IMAGE
    (tmp_path / "aws.yaml").write_text(yaml.safe_dump(raw))
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    address, port = server.get_host_and_port()
    for name, value in {
        **KEYS,
        "AWS_ENDPOINT_URL": f"http://{address}:{port}",
        "HOME": str(tmp_path),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SHIM": str(tmp_path / "shim"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the credentials of its first use
    yield Cloud(boto3.client("ec2"), tmp_path)
    server.stop()


def workers(cloud, head):
    """Start a machine of each group as the head's autoscaler does, from the files that the head was given."""
    (config,), (key,) = cloud.copied("ray_bootstrap_config.yaml"), cloud.copied("ray_bootstrap_key.pem")
    (cloud.home / key.name).write_bytes(key.read_bytes())
    reader = FileConfigReader(str(config))
    settings = reader.get_cached_autoscaling_config()
    provider = _get_node_provider(settings.get_config("provider"), settings.get_config("cluster_name"))
    machines = NodeProviderAdapter(provider, reader)
    wanted = dict.fromkeys(("cpu", "gpu_spot", "gpu_on_demand"), 1)  # the mock starts one machine a request
    machines.launch(wanted, "request")
    until = time.monotonic() + 60
    while len(machines.get_non_terminated()) < 4 and time.monotonic() < until:
        assert machines.poll_errors() == []
        time.sleep(0.5)
    found = cloud.machines()
    assert {group: len(members) for group, members in found.items()} == {"head": 1, **wanted}
    for group, members in found.items():
        spot = members[0].get("InstanceLifecycle") == "spot"
        assert spot == (group == "gpu_spot")
    for group in wanted:
        one = found[group][0]
        assert one["IamInstanceProfile"]["Arn"].endswith("instance-profile/ktray-worker")
        assert one["InstanceType"] == {"cpu": "c7i.4xlarge"}.get(group, "g6.4xlarge")
        instance = Instance(instance_type=group, cloud_instance_id=one["InstanceId"])
        RayInstaller(provider, settings).install_ray(instance, head)
        ran = cloud.commands(one["PrivateIpAddress"])
        assert "RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP:6379" in ran
        assert f"export RAY_HEAD_IP={head};" in ran
        assert "/.ray/auth_token:/home/ktray/.ray/auth_token" in ran


@pytest.mark.long
@pytest.mark.slow
def test_up_workers_and_down(cloud):
    vpc = cloud.ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"][0]["VpcId"]
    parameters = {"Bucket": "bucket", "Vpc": vpc, "SshFrom": "203.0.113.7/32"}
    boto3.client("cloudformation").create_stack(
        StackName="ktray-access",
        TemplateBody=(ROOT / "cluster/aws-access.yaml").read_text(),
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
    )
    made = cloud.ec2.describe_security_groups(GroupNames=["ktray"])["SecurityGroups"]

    cloud.ray("up", "--no-config-cache")
    ((head,),) = cloud.machines().values()
    assert head["IamInstanceProfile"]["Arn"].endswith("instance-profile/ktray-head")
    assert head["Tags"]["ray-node-status"] == "up-to-date"
    assert head["InstanceType"] == "m7i.xlarge"
    assert head["MetadataOptions"]["HttpTokens"] == "required"
    # The group of the template and its rules as they were, none added by Ray.
    assert [group["GroupId"] for group in head["SecurityGroups"]] == [made[0]["GroupId"]]
    assert cloud.ec2.describe_security_groups(GroupNames=["ktray"])["SecurityGroups"] == made

    # What it starts with: the dashboard on loopback, the token, and the autoscaler's version 2.
    ran = cloud.commands(head["PublicIpAddress"])
    assert "RAY_AUTH_MODE=token ray start --head --port=6379" in ran
    assert "--dashboard-host=127.0.0.1" in ran
    assert "export RAY_enable_autoscaler_v2=1" in ran
    assert f"docker pull {IMAGE}" in ran
    assert "/.ray/auth_token:/home/ktray/.ray/auth_token" in ran
    assert [path.read_text() for path in cloud.copied("auth_token")] == ["a" * 64]

    workers(cloud, head["PrivateIpAddress"])
    cloud.ray("down")
    assert cloud.machines() == {}
