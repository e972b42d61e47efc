"""Whose run it is, in MLflow."""

import json
import subprocess

from ktray import recipe as recipes
from ktray.tracking import tags
from ktray.tracking.tags import run_tags


def test_in_a_job_the_owner_is_who_submitted_it(monkeypatch):
    metadata = {"job_submission_id": "raysubmit_1", "job_name": "distill", "owner": "ada", "commit": "c0ffee"}
    monkeypatch.setenv(tags.JOB_CONFIG, json.dumps({"runtime_env": {}, "metadata": metadata}))
    monkeypatch.setattr("sys.argv", ["jobs/distill.py", "seed=1", "mlflow.uri=https://me:pass@host", "api_key=12345"])
    found = tags.identity()
    assert found["mlflow.user"] == "ada"
    assert found["mlflow.source.git.commit"] == "c0ffee"
    assert (found["ray.submission_id"], found["ray.job_name"]) == ("raysubmit_1", "distill")
    assert found["ktray.command"].startswith("python jobs/distill.py seed=1 ")
    assert "pass" not in found["ktray.command"]
    assert "12345" not in found["ktray.command"]


def test_the_installed_command_is_named_too(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/opt/venv/bin/ktray", "distill", "seed=1", "api_key=12345"])
    shown = tags.identity()["ktray.command"]
    assert shown.startswith("ktray distill seed=1 ")
    assert "12345" not in shown
    monkeypatch.setattr("sys.argv", ["/opt/venv/bin/pytest", "tests"])
    assert "ktray.command" not in tags.identity()


def test_outside_a_job_it_is_the_user_of_the_machine(monkeypatch):
    monkeypatch.delenv(tags.JOB_CONFIG, raising=False)
    monkeypatch.setattr("getpass.getuser", lambda: "grace")
    found = tags.identity()
    assert found["mlflow.user"] == "grace"
    assert "ray.submission_id" not in found
    asked = subprocess.run(["git", "-C", str(tags.ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if asked.returncode == 0:
        assert found["mlflow.source.git.commit"] == asked.stdout.strip()

    def nobody():
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert tags.user() == "unknown"


def test_the_recipes_name_and_tags_stand_over_the_jobs(monkeypatch):
    part = recipes.load(None, ["mlflow.tags={team: vision, ticket: 42}", "mlflow.tags.task=own"]).mlflow
    found = run_tags(part, {"task": "letters", "job": "index"})
    assert {k: found[k] for k in ("team", "ticket", "task", "job")} == {
        "team": "vision",
        "ticket": "42",
        "task": "own",
        "job": "index",
    }
    assert "mlflow.runName" not in found
    named = recipes.load(None, ["mlflow.run_name=monday"]).mlflow
    assert run_tags(named, {})["mlflow.runName"] == "monday"
    assert run_tags(named, {"mlflow.runName": "scratch, seed 0"})["mlflow.runName"] == "monday, scratch, seed 0"
