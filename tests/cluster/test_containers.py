"""cluster/local/ as it stands in its files, and the image where this machine has it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

LOCAL = Path(__file__).resolve().parents[2] / "cluster" / "local"
TEXT = (LOCAL / "compose.yaml").read_text()
SECRETS = {"RAY_AUTH_TOKEN", "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY", "POSTGRES_PASSWORD", "S3_SECRET"}


def services():
    return yaml.safe_load(TEXT)["services"]


def test_ports_are_on_the_loopback_and_only_for_those_who_ask_who_is_there():
    ports = {name: service.get("ports", []) for name, service in services().items()}
    assert {name for name, open_to in ports.items() if open_to} == {"head", "mlflow", "s3"}
    assert all(port.startswith("127.0.0.1:") for open_to in ports.values() for port in open_to)


def test_nodes_ask_for_the_token_and_the_head_does_no_work():
    head, worker = services()["head"], services()["worker"]
    assert all(one["environment"]["RAY_AUTH_MODE"] == "token" for one in (head, worker))
    assert "--num-cpus=0" in head["command"].split()


def test_no_secret_has_a_default_and_up_makes_each():
    asked = dict(re.findall(r"\$\{(\w+):\?(.*?)\}", TEXT))
    assert set(asked) == SECRETS
    assert not SECRETS & set(re.findall(r"\$\{(\w+):-", TEXT))
    (made,) = re.findall(r"for name in ([A-Z0-9_ ]+); do", (LOCAL / "up.sh").read_text())
    assert set(made.split()) == SECRETS
    assert "/cluster/local/.env" in (LOCAL.parents[1] / ".gitignore").read_text().split()


def test_the_scripts_are_bash():
    for script in [*LOCAL.glob("*.sh"), LOCAL / "s3" / "start.sh"]:
        subprocess.run(["bash", "-n", script], check=True)


@pytest.fixture
def in_image():
    """Run a command in a container of ktray's image; (exit code, output)."""
    tools = [one for one in ("docker", "podman") if shutil.which(one)]
    if not tools:
        pytest.skip("neither docker nor podman is installed")
    image = os.environ.get("KTRAY_IMAGE", "localhost/ktray")
    has = [one for one in tools if not subprocess.run([one, "image", "inspect", image], capture_output=True).returncode]
    if not has:
        pytest.skip(f"no image {image}: build it as cluster/README.md says, or name another in KTRAY_IMAGE")

    def run(*command):
        whole = [has[0], "run", "--rm", "--network", "none", image, *command]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.container
def test_the_image_runs_a_job_as_a_user_without_rights(in_image):
    code, said = in_image("sh", "-c", "id -u && python jobs/distill.py --help")
    assert code == 0, said
    assert said.startswith("1000\n")
    assert "cluster.workers" in said


@pytest.mark.container
def test_the_image_starts_no_cluster_without_a_token(in_image):
    code, said = in_image("ray", "start", "--head", "--num-cpus=1")
    assert code != 0
    assert "token" in said
