"""MLflow tags that name the owner and the origin of a run.

The owner is the person who submitted the job. ``--dry-submit`` writes the owner into the metadata of the job, because
all jobs of a cluster run as the same user. Outside a submitted job, the owner is the user of this process.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ktray.distributed.connect import job_id
from ktray.recipe.cluster import MLflowConfig
from ktray.tracking.tracker import scrub

ROOT = Path(__file__).resolve().parents[2]
RUN_NAME = "mlflow.runName"
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it in the driver of a submitted job


def job_metadata() -> dict[str, str]:
    """Metadata of the submitted job that this process drives: Ray's ``job_submission_id`` and ``job_name``, and the
    entries of ``--metadata-json``. It is empty outside a submitted job."""
    metadata = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("metadata") or {}
    return {str(k): str(v) for k, v in metadata.items()}


def user() -> str:
    """Name of the user of this process; ``unknown`` if the machine has no name for the user id."""
    with contextlib.suppress(KeyError, OSError, ImportError):
        return getpass.getuser()
    return "unknown"


def commit() -> str | None:
    """The git commit of the checkout that ktray runs from; None without a checkout, for example in a container
    image."""
    if not (ROOT / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


def command(argv: Sequence[str]) -> str:
    """A command as one line of shell, with secrets hidden."""
    words = []
    for word in argv:
        key, sign, value = word.partition("=")
        words.append(f"{key}={scrub(value, key)}" if sign else str(scrub(word)))
    return shlex.join(words)


def run_tags(part: MLflowConfig, own: Mapping[str, str]) -> dict[str, str]:
    """The tags of a run. Tags of ``mlflow.tags`` replace those of the job, and these replace those of `identity`.

    Args:
        part: the recipe section ``mlflow``.
        own: tags of the job. A run name in it (``mlflow.runName``) is appended to ``mlflow.run_name``.
    """
    tags = {**identity(), **own, **{name: str(value) for name, value in part.tags.items()}}
    name = ", ".join(text for text in (part.run_name, own.get(RUN_NAME)) if text)
    return {**tags, **({RUN_NAME: name} if name else {})}


def identity() -> dict[str, str]:
    """The tags ``mlflow.user``, ``mlflow.source.git.commit``, ``ktray.command``, ``ray.job_id``, ``ray.submission_id``
    and ``ray.job_name``, as far as they are known."""
    metadata = job_metadata()
    tags = {
        "mlflow.user": metadata.get("owner") or user(),
        "mlflow.source.git.commit": metadata.get("commit") or commit(),
        "ktray.command": _own_command(),
        "ray.job_id": job_id(),
        "ray.submission_id": metadata.get("job_submission_id"),
        "ray.job_name": metadata.get("job_name"),
    }
    return {name: value for name, value in tags.items() if value}


def _own_command() -> str | None:
    """The command of this process, as ``python jobs/distill.py ...`` or ``ktray distill ...``; None for other
    programs."""
    program, *words = sys.argv or [""]
    if Path(program).name == "ktray":
        return command(["ktray", *words])
    return command(["python", program, *words]) if program.endswith(".py") else None
