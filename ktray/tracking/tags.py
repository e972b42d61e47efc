"""Whose run it is and where it came from, as tags of MLflow.

The owner is who submitted the job: ``--dry-submit`` writes it into the job's metadata, since on the cluster all jobs
run as one user. Outside a job it is the user of this machine.
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
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the driver of a submitted job


def job_metadata() -> dict[str, str]:
    """Of the job that this driver is: Ray's ``job_submission_id`` and ``job_name``, and what ``--metadata-json`` gave.
    Empty outside a job."""
    found = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("metadata") or {}
    return {str(k): str(v) for k, v in found.items()}


def user() -> str:
    """Name of the user of this process; ``unknown`` where the machine has none for its number."""
    with contextlib.suppress(KeyError, OSError, ImportError):
        return getpass.getuser()
    return "unknown"


def commit() -> str | None:
    """Of the checkout that ktray runs from; None where there is none, as in an image or in a job's working folder."""
    if not (ROOT / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


def command(argv: Sequence[str]) -> str:
    """A command line in one line, with secrets hidden."""
    words = []
    for word in argv:
        key, sign, value = word.partition("=")
        words.append(f"{key}={scrub(value, key)}" if sign else str(scrub(word)))
    return shlex.join(words)


def run_tags(part: MLflowConfig, own: Mapping[str, str]) -> dict[str, str]:
    """The tags of a run: `identity`, then those that the job gives it, then those of ``mlflow.tags``. A name that the
    job gives (``mlflow.runName``) stands behind ``mlflow.run_name``."""
    found = {**identity(), **own, **{name: str(value) for name, value in part.tags.items()}}
    name = ", ".join(text for text in (part.run_name, own.get(RUN_NAME)) if text)
    return {**found, **({RUN_NAME: name} if name else {})}


def identity() -> dict[str, str]:
    """``mlflow.user``, ``mlflow.source.git.commit``, ``ktray.command``, ``ray.job_id``, ``ray.submission_id`` and
    ``ray.job_name``, those that there are."""
    metadata = job_metadata()
    found = {
        "mlflow.user": metadata.get("owner") or user(),
        "mlflow.source.git.commit": metadata.get("commit") or commit(),
        "ktray.command": _own_command(),
        "ray.job_id": job_id(),
        "ray.submission_id": metadata.get("job_submission_id"),
        "ray.job_name": metadata.get("job_name"),
    }
    return {name: value for name, value in found.items() if value}


def _own_command() -> str | None:
    """This process's command, as ``python jobs/distill.py ...`` or ``ktray distill ...``; None for other programs."""
    program, *words = sys.argv or [""]
    if Path(program).name == "ktray":
        return command(["ktray", *words])
    return command(["python", program, *words]) if program.endswith(".py") else None
