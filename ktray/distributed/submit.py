"""The ``ray job submit`` that runs a job's command on a cluster, in words for a shell."""

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

# What decides on the cluster where a job reads and logs; handed over where it is set here.
HANDED = (
    *DATA_SETTINGS,
    "MLFLOW_TRACKING_URI",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "KTRAY_INSTANCE",
)
# A job's environment can be read by all who reach the dashboard, so these have to be on the nodes.
SECRET = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "HF_TOKEN",
)
CLIENT = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")  # of the command itself; the nodes have their own
# Beside those that .gitignore names and those that Ray leaves out by itself (.git, .venv, venv, __pycache__).
EXCLUDES = ("/ktray-store/", "/mlruns/", "/.pytest_cache/", "/.mypy_cache/", "/.ruff_cache/")


def lines(
    program: str, argv: Sequence[str], recipe: Recipe, environment: Mapping[str, str], here: Path | None = None
) -> list[str]:
    """Comments and, last, the command.

    Args:
        program: the job's name, of ``jobs/<program>.py``.
        argv: the job's arguments.
        environment: variables of the shell that would submit.
        here: the folder that it would be in; None: the current one.

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
        switch = value.lower() in ("true", "false", "null")  # class_token=true is no secret
        if HIDDEN in str(scrub(word)) or (HIDDEN in str(scrub(value, key)) and not switch):
            raise KtrayError(
                f"'{key}' holds a secret, and a job's command is shown to all who see the cluster's list of jobs",
                f"Leave it out and set it on the nodes ({', '.join(SECRET)}).",
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
        comments.append("neither RAY_API_SERVER_ADDRESS nor RAY_ADDRESS is set: it goes to a Ray on this machine")
    return [*(f"# {text}" for text in comments), _shell(words)]


def _environment(environment: Mapping[str, str], recipe: Recipe) -> tuple[list[str], dict[str, str]]:
    comments, variables = [], {}
    for name in HANDED:
        value = environment.get(name)
        if not value:
            continue
        parts = urlsplit(value)
        if name == "MLFLOW_TRACKING_URI" and parts.scheme not in ("http", "https"):
            # A file of this machine is not the cluster's, and a database's address holds its password.
            comments.append(f"{name} is no server's address and is left out; on the nodes it may be set")
            continue
        if "@" in parts.netloc:
            comments.append(f"{name} goes without its user and password; they have to be on the nodes")
            value = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        variables[name] = str(scrub(value))
    held = [name for name in SECRET if environment.get(name)]
    if held:
        comments.append(f"not in the command, to be set on the nodes (or roles in place of keys): {', '.join(held)}")
    if environment.get("RAY_AUTH_TOKEN"):
        comments.append("RAY_AUTH_TOKEN has to be set in the shell that runs it")
    if "://" not in recipe.store and not Path(recipe.store).expanduser().is_absolute():
        comments.append(f"store={recipe.store} is relative: on the cluster it lies in the home folder of the head")
    return comments, variables


def _inside(store: str) -> list[str]:
    """A store in the checkout is not to be sent along."""
    if "://" in store:
        return []
    path = (ROOT / Path(store).expanduser()).resolve()
    if path == ROOT or not path.is_relative_to(ROOT):
        return []
    name = f"/{path.relative_to(ROOT).as_posix()}/"
    return [] if name in EXCLUDES else [name]


def _sent(argv: Sequence[str], here: Path) -> list[str]:
    """The arguments as they hold in the folder that is sent: recipe files by their path in it."""
    out, recipe_follows = [], False
    for word in argv:
        name = word.removeprefix("--recipe=") if word.startswith("--recipe=") else word if recipe_follows else ""
        if name.endswith((".yaml", ".yml")):
            path = (here / name).resolve()
            if not path.is_relative_to(ROOT):
                raise KtrayError(
                    f"Recipe '{name}' lies outside {ROOT}, the folder that is sent to the cluster", "Copy it there."
                )
            word = word[: len(word) - len(name)] + os.fspath(path.relative_to(ROOT))
        out.append(word)
        recipe_follows = word == "--recipe"
    return out


def _shell(words: Sequence[str]) -> str:
    """`shlex.join`, but settings of variables before the command stay such."""
    count = next(i for i, word in enumerate(words) if word == "ray")
    before = [f"{name}={shlex.quote(value)}" for name, _, value in (word.partition("=") for word in words[:count])]
    return " ".join([*before, shlex.join(words[count:])])
