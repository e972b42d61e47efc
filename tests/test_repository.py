"""The files around the code: CI, hooks, dev container, issue forms, CONTRIBUTING, and rules for every tracked file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from ktray import bootstrap

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
DEVCONTAINER = ROOT / ".devcontainer" / "devcontainer.json"
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"
# Absolute paths of a person's or a machine's own folders. The user of the image, ktray, is the same on every machine,
# and "me" is a made-up user in tests.
MACHINE_PATH = re.compile(r"(?<![\w.$}~-])/(?:home/(?!(?:ktray|me)\b)|Users/|root/|work/|tmp/wt-)\w")


def workflow() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text())


def steps() -> list[dict[str, Any]]:
    return [step for job in workflow()["jobs"].values() for step in job["steps"]]


def tracked() -> list[str]:
    """Names of the files that git tracks."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in names.split("\0") if name]


# --------------------------------------------------------------------------------------------------- CI


def test_ci_runs_on_every_python_that_the_lock_covers() -> None:
    (job,) = workflow()["jobs"].values()
    low, high = bootstrap.LOCKED_PYTHONS
    assert low[0] == high[0]
    assert job["strategy"]["matrix"]["python"] == [f"{low[0]}.{minor}" for minor in range(low[1], high[1] + 1)]
    (setup,) = [step for step in steps() if step.get("uses", "").startswith("actions/setup-python@")]
    assert setup["with"]["python-version"] == "${{ matrix.python }}"


def test_ci_runs_the_script_of_the_repository_within_a_time_limit() -> None:
    (job,) = workflow()["jobs"].values()
    assert [step["run"] for step in job["steps"] if ".ci/run" in step.get("run", "")] == ["bash .ci/run"]
    assert 30 <= job["timeout-minutes"] <= 120
    assert job["runs-on"] == "ubuntu-latest"


def test_ci_may_read_only_and_takes_pinned_actions() -> None:
    assert workflow()["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in workflow()["jobs"].values())
    actions = [step["uses"] for step in steps() if "uses" in step]
    assert actions
    assert all(re.fullmatch(r"actions/[\w-]+@(v\d+|[0-9a-f]{40})", action) for action in actions)
    (checkout,) = [step for step in steps() if step.get("uses", "").startswith("actions/checkout@")]
    assert checkout["with"]["persist-credentials"] is False


def test_the_pip_cache_follows_the_lock_files() -> None:
    (cache,) = [step for step in steps() if step.get("uses", "").startswith("actions/cache@")]
    (pattern,) = re.findall(r"hashFiles\('(.*?)'\)", cache["with"]["key"])
    assert {bootstrap.LOCK, bootstrap.LOCK_DEV} <= {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)}


# ------------------------------------------------------------------------------------ hooks, dev container


def test_pre_commit_uses_the_locked_ruff() -> None:
    (locked,) = re.findall(r"^ruff==(\S+)", (ROOT / bootstrap.LOCK_DEV).read_text(), re.M)
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["rev"] == f"v{locked}"
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format"]


def test_the_dev_container_builds_from_the_dockerfile() -> None:
    config = json.loads(DEVCONTAINER.read_text())
    dockerfile = (DEVCONTAINER.parent / config["build"]["dockerfile"]).resolve()
    assert dockerfile == ROOT / "Dockerfile"
    assert (DEVCONTAINER.parent / config["build"]["context"]).resolve() == ROOT
    text = dockerfile.read_text()
    assert set(config["build"]["args"]) <= set(re.findall(r"^ARG (\w+)", text, re.M))
    assert re.findall(r"useradd .* (\w+)\s", text) == [config["remoteUser"]]
    shell, script = config["postCreateCommand"].split()
    assert shell == "bash"
    subprocess.run([shell, "-n", ROOT / script], check=True)
    assert "ktray.bootstrap --dev" in (ROOT / script).read_text()


# -------------------------------------------------------------------------------------------------- forms


def form_faults(form: Any) -> list[str]:
    """What GitHub would refuse, by its list of validation errors for issue forms."""
    faults = [f"{key} is missing" for key in ("name", "description", "body") if not form.get(key)]
    body = form.get("body") or []
    if all(element.get("type") == "markdown" for element in body):
        faults.append("body has no field to fill in")
    for number, element in enumerate(body):
        kind, attributes = element.get("type"), element.get("attributes", {})
        if kind not in ("markdown", "input", "textarea", "dropdown", "checkboxes"):
            faults.append(f"body[{number}] has the unknown type {kind}")
        needed = ["value"] if kind == "markdown" else ["label"]
        needed += ["options"] if kind in ("dropdown", "checkboxes") else []
        faults += [f"body[{number}] has no {key}" for key in needed if not attributes.get(key)]
    for what, values in (
        ("id", [element["id"] for element in body if "id" in element]),
        ("label", [element["attributes"]["label"] for element in body if "label" in element.get("attributes", {})]),
    ):
        faults += [f"the {what} {value} is used twice" for value in sorted(set(values)) if values.count(value) > 1]
    return faults


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_are_valid_and_ask_for_what_is_needed(name: str) -> None:
    form = yaml.safe_load((FORMS / f"{name}.yml").read_text())
    assert form_faults(form) == []
    required = {one["id"] for one in form["body"] if one.get("validations", {}).get("required")}
    needed = {"bug": {"command", "expected", "actual", "environment", "commit"}, "feature": {"problem", "proposal"}}
    assert needed[name] <= required


def test_a_faulty_form_is_found() -> None:
    assert form_faults({"name": "a", "body": [{"type": "markdown", "attributes": {"value": "a"}}]}) == [
        "description is missing",
        "body has no field to fill in",
    ]
    twice = {"type": "dropdown", "id": "a", "attributes": {"label": "A"}}
    assert form_faults({"name": "a", "description": "a", "body": [twice, twice]}) == [
        "body[0] has no options",
        "body[1] has no options",
        "the id a is used twice",
        "the label A is used twice",
    ]


# -------------------------------------------------------------------------------------- the walk-through


def walk_through() -> list[tuple[str, str]]:
    """(language, content) of the blocks of CONTRIBUTING.md that are marked for this test, in their order."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.findall(r"^<!-- test: objective -->\n```(\w+)\n(.*?)^```$", text, re.M | re.S)


@pytest.fixture
def fresh_checkout(tmp_path: Path) -> Path:
    """A checkout with an environment of its own, which reads the packages of this one: nothing is installed here."""
    checkout = tmp_path / "ktray"
    checkout.mkdir()
    for name in ("ktray", "jobs"):
        (checkout / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout / ".venv"], check=True)
    (site,) = (checkout / ".venv" / "lib").glob("python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return checkout


@pytest.mark.slow
@pytest.mark.parametrize("with_job", [False, pytest.param(True, marks=pytest.mark.long)])
def test_an_objective_is_added_as_the_text_says(fresh_checkout: Path, with_job: bool) -> None:
    blocks = walk_through()
    assert [language for language, _ in blocks] == ["toml", "python", "python", "bash", "bash"]
    assert "jobs/distill.py" in blocks[-1][1]
    blocks = blocks if with_job else blocks[:-1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    printed = ""
    for language, content in blocks:
        if language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", content]
            done = subprocess.run(command, cwd=fresh_checkout, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{content}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            printed += done.stdout
        else:
            path = fresh_checkout / content.splitlines()[0].removeprefix("# ")
            path.parent.mkdir(exist_ok=True)
            path.write_text(content, encoding="utf-8")
    assert "1 passed" in printed
    if not with_job:
        return
    (folder,) = (fresh_checkout / "ktray-store" / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert result["objective"] == "logits_mse"
    assert 0.3 < result["metric"]["test"] <= 1  # ten classes: chance is 0.1


# ------------------------------------------------------------------------------------------- tracked files


def test_the_lock_files_are_in_one_folder() -> None:
    assert not list(ROOT.glob("constraints*.txt"))
    names = {name for name in tracked() if re.search(r"constraints[\w-]*\.txt$", name)}
    # The build of the MLflow server's image sees only the folder of its Dockerfile.
    assert {name.rpartition("/")[0] for name in names} == {"requirements", "cluster/mlflow"}
    assert {bootstrap.LOCK, bootstrap.LOCK_DEV} <= names


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    for path in ("home/ann/ktray", "Users/ann/ktray", "root/ktray", "work/main"):
        assert MACHINE_PATH.search(f"see /{path}")
    assert not MACHINE_PATH.search("https://example.com/" + "home/ann and cluster/" + "work/a")
    found = []
    for name in tracked():
        path = ROOT / name
        if path.is_symlink() or not path.is_file():  # removed, and not committed yet
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{name}: {line.strip()[:100]}" for line in text.splitlines() if MACHINE_PATH.search(line)]
    assert found == []
