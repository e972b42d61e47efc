"""--dry-submit: what it prints is what Ray's own command line takes."""

import getpass
import json
import shlex

import pytest

from ktray import cli
from ktray import recipe as recipes
from ktray.distributed import submit
from ktray.errors import KtrayError
from ktray.jobs.definitions import Job
from ktray.tracking import tags

ROOT = tags.ROOT


def printed(argv, environment, here=ROOT):
    settings = [w for w in argv if "=" in w and not w.startswith("-")]
    *comments, command = submit.lines("distill", argv, recipes.load(None, settings), environment, here)
    assert all(line.startswith("# ") for line in comments)
    return "\n".join(comments), command


def parsed(command):
    """The command as Ray understands it."""
    from ray.dashboard.modules.job.cli import submit as click_command

    words = shlex.split(command)
    at = words.index("ray")
    assert words[at : at + 3] == ["ray", "job", "submit"]
    found = click_command.make_context("submit", words[at + 3 :]).params
    return dict(word.split("=", 1) for word in words[:at]), found


def test_ray_takes_the_command_as_it_is_printed():
    argv = ["task.data=/shared/my photos", "student.kwargs={patch_size: 2}", "store=s3://bucket/it's", "--debug"]
    environment = {
        "RAY_ADDRESS": "http://127.0.0.1:8265",
        "RAY_AUTH_MODE": "token",
        "AWS_ENDPOINT_URL": "http://s3.example.com:9000",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "MLFLOW_TRACKING_URI": "https://mlflow.example.com",
        "EDITOR": "vi",
    }
    comments, command = printed(argv, environment)
    assert comments == ""
    before, found = parsed(command)
    assert before == {"RAY_AUTH_MODE": "token"}
    assert found["address"] == "http://127.0.0.1:8265"
    assert found["working_dir"] == "."
    assert found["entrypoint"] == ("python", "jobs/distill.py", *argv)
    assert found["entrypoint_num_cpus"] == 0
    runtime = json.loads(found["runtime_env_json"])
    assert runtime["env_vars"] == {
        name: environment[name]
        for name in ("AWS_ENDPOINT_URL", "AWS_REQUEST_CHECKSUM_CALCULATION", "MLFLOW_TRACKING_URI")
    }
    metadata = json.loads(found["metadata_json"])
    assert (metadata["owner"], metadata["job_name"]) == (getpass.getuser(), "distill")
    assert metadata.get("commit") == tags.commit()


def test_no_secret_is_printed():
    environment = {
        "AWS_ACCESS_KEY_ID": "AKIAABCDEFGHIJKLMNOP",
        "AWS_SECRET_ACCESS_KEY": "very-secret-key",
        "RAY_AUTH_TOKEN": "ray-secret-token",
        "MLFLOW_TRACKING_URI": "https://me:mlflow-secret@mlflow.example.com/ml",
        "AWS_ENDPOINT_URL": "http://me:s3-secret@s3.example.com",
    }
    comments, command = printed(["store=/shared/store"], environment)
    for secret in ("AKIA", "very-secret", "ray-secret", "mlflow-secret", "s3-secret"):
        assert secret not in comments + command
    for name in environment:
        assert name in comments
    assert json.loads(parsed(command)[1]["runtime_env_json"])["env_vars"] == {
        "MLFLOW_TRACKING_URI": "https://mlflow.example.com/ml",
        "AWS_ENDPOINT_URL": "http://s3.example.com",
    }
    comments, command = printed(["store=/shared/s"], {"MLFLOW_TRACKING_URI": "postgresql://me:db-secret@host/db"})
    assert "db-secret" not in comments + command
    assert "MLFLOW_TRACKING_URI" not in command
    with pytest.raises(KtrayError, match=r"mlflow\.uri.*has a secret") as caught:
        printed(["mlflow.uri=https://me:pass-word@mlflow.example.com"], {})
    assert "pass-word" not in str(caught.value)
    printed(["student.kwargs.class_token=true"], {})


def test_paths_hold_in_the_folder_that_is_sent(tmp_path):
    _, command = printed(["--recipe", "letters"], {}, tmp_path)
    assert parsed(command)[1]["working_dir"] == str(ROOT)
    _, command = printed(["--recipe", "letters.yaml", "store=ktray-two"], {}, ROOT / "ktray" / "recipe" / "builtin")
    found = parsed(command)[1]
    assert found["entrypoint"][2:] == ("--recipe", "ktray/recipe/builtin/letters.yaml", "store=ktray-two")
    assert json.loads(found["runtime_env_json"])["excludes"][-1] == "/ktray-two/"
    with pytest.raises(KtrayError, match="outside"):
        printed([f"--recipe={tmp_path}/mine.yaml"], {})


def test_every_job_has_it_and_does_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")

    def never(*_):
        raise AssertionError("it ran")

    words = ["--only", "read", "--dry-submit", "seed=3"]
    assert cli.main(Job("bench", "purpose", never, never, {"--only": "bench.only=[{}]"}), words) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert parsed(command)[1]["entrypoint"] == ("python", "jobs/bench.py", "--only", "read", "seed=3")
    assert cli.main(Job("distill", "purpose", never, never), ["--dry-submit", "sead=3"]) == 2
    assert "seed" in capsys.readouterr().err


def test_without_a_checkout_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "ROOT", tmp_path)  # as where ktray is an installed package
    with pytest.raises(KtrayError, match=r"sends a checkout of ktray.*jobs/distill\.py"):
        printed(["seed=1"], {})
