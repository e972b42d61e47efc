"""The command line for a shell that runs a job on a cluster with ``ray job submit``."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from ktray.distributed.connect import DATA_SETTINGS
from ktray.errors import KtrayError
from ktray.recipe.schema import Recipe
from ktray.redact import HIDDEN, scrub
from ktray.tracking.tags import ROOT, commit, user

# Variables that decide where a job reads and logs. Those that are set here are passed on to the cluster.
PASSED_ON = (
    *DATA_SETTINGS,
    "MLFLOW_TRACKING_URI",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "HF_HUB_OFFLINE",
    "KTRAY_INSTANCE",
)
# Everyone who can reach the dashboard can read a job's environment, so these variables must be set on the nodes.
SECRET = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "HF_TOKEN",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "GOOGLE_APPLICATION_CREDENTIALS",
)
CLIENT = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")  # variables for the command itself; the nodes have their own values
# Folders that are not sent, in addition to those in .gitignore and those that Ray excludes (.git, .venv, venv,
# __pycache__).
EXCLUDES = ("/ktray-store/", "/mlruns/", "/.pytest_cache/", "/.mypy_cache/", "/.ruff_cache/")


def lines(
    program: str, argv: Sequence[str], recipe: Recipe, environment: Mapping[str, str], here: Path | None = None
) -> list[str]:
    """Lines with comments and, as the last line, the command.

    Args:
        program: the job's name, as in ``jobs/<program>.py``.
        argv: the job's arguments.
        environment: variables of the shell that the command would run in.
        here: the folder that the command would run in; None: the current one.

    Raises:
        KtrayError: an argument holds a secret, which everyone would see in the list of jobs, or names a recipe outside
            the folder that is sent; or ktray does not run from a checkout.
    """
    here = here or Path.cwd()
    if not (ROOT / "jobs" / f"{program}.py").is_file():
        raise KtrayError(
            f"--dry-submit sends a checkout of ktray, and {ROOT} has no jobs/{program}.py",
            "Run it from a checkout: python jobs/NAME.py ... --dry-submit.",
        )
    for word in argv:
        key, _, value = word.partition("=")
        switch = value.lower() in ("true", "false", "null")  # class_token=true is not a secret
        if HIDDEN in str(scrub(word)) or (HIDDEN in str(scrub(value, key)) and not switch):
            raise KtrayError(
                f"'{key}' holds a secret, and everyone who sees the cluster's list of jobs can read a job's command",
                f"Remove it from the command and set it on the nodes ({', '.join(SECRET)}).",
            )
    comments, variables = _environment(environment, recipe)
    metadata = {"job_name": recipe.mlflow.run_name or program, "owner": user(), "commit": commit()}
    runtime = {"env_vars": variables, "excludes": [*EXCLUDES, *_inside(recipe.store)]}
    address = environment.get("RAY_API_SERVER_ADDRESS") or environment.get("RAY_ADDRESS")
    words = [
        *(f"{name}={environment[name]}" for name in CLIENT if environment.get(name)),
        *("ray", "job", "submit"),
        *(("--address", address) if address else ()),
        *("--working-dir", "." if here.resolve() == ROOT else str(ROOT)),
        *("--runtime-env-json", json.dumps(runtime)),
        *("--metadata-json", json.dumps({k: v for k, v in metadata.items() if v})),
        *("--entrypoint-num-cpus", "0"),
        *("--", "python", f"jobs/{program}.py", *_sent(argv, here)),
    ]
    if not address:
        comments.append(
            "neither RAY_API_SERVER_ADDRESS nor RAY_ADDRESS is set: the job is submitted to a Ray on this machine"
        )
    return [*(f"# {text}" for text in comments), _shell(words)]


def _environment(environment: Mapping[str, str], recipe: Recipe) -> tuple[list[str], dict[str, str]]:
    comments, variables = [], {}
    for name in PASSED_ON:
        value = environment.get(name)
        if not value:
            continue
        parts = urlsplit(value)
        if name == "MLFLOW_TRACKING_URI" and parts.scheme not in ("http", "https"):
            # The cluster does not have this machine's files, and the address of a database holds its password.
            comments.append(
                f"{name} is not the address of a server and is not passed on; set it on the nodes if needed"
            )
            continue
        if "@" in parts.netloc:
            comments.append(f"{name} is passed on without user and password; set them on the nodes")
            value = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        variables[name] = str(scrub(value))
    held = [name for name in SECRET if environment.get(name)]
    if held:
        comments.append(f"not passed on; set on the nodes, or use roles instead of keys: {', '.join(held)}")
    if environment.get("RAY_AUTH_TOKEN"):
        comments.append("RAY_AUTH_TOKEN must be set in the shell that runs the command")
    if "://" not in recipe.store and not Path(recipe.store).expanduser().is_absolute():
        comments.append(f"store={recipe.store} is relative: on the cluster it is in the home folder of the head node")
    return comments, variables


def _inside(store: str) -> list[str]:
    """The pattern that excludes a store inside the checkout from what is sent; empty for a store elsewhere."""
    if "://" in store:
        return []
    path = (ROOT / Path(store).expanduser()).resolve()
    if path == ROOT or not path.is_relative_to(ROOT):
        return []
    name = f"/{path.relative_to(ROOT).as_posix()}/"
    return [] if name in EXCLUDES else [name]


def _sent(argv: Sequence[str], here: Path) -> list[str]:
    """The arguments for the folder that is sent: paths of recipe files become relative to it."""
    sent, recipe_follows = [], False
    for word in argv:
        name = word.removeprefix("--recipe=") if word.startswith("--recipe=") else word if recipe_follows else ""
        if name.endswith((".yaml", ".yml")):
            path = (here / name).resolve()
            if not path.is_relative_to(ROOT):
                raise KtrayError(
                    f"Recipe '{name}' is outside {ROOT}, the folder that is sent to the cluster",
                    "Copy the recipe into that folder.",
                )
            word = word[: len(word) - len(name)] + os.fspath(path.relative_to(ROOT))
        sent.append(word)
        recipe_follows = word == "--recipe"
    return sent


def _shell(words: Sequence[str]) -> str:
    """`shlex.join`, except that variables that are set before the command are still recognised by the shell."""
    count = next(i for i, word in enumerate(words) if word == "ray")
    before = [f"{name}={shlex.quote(value)}" for name, _, value in (word.partition("=") for word in words[:count])]
    return " ".join([*before, shlex.join(words[count:])])
