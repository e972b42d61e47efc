"""The folder of a run: that of an unfinished run of the same recipe, or a new one; never one that another job fills."""

from __future__ import annotations

import contextlib
import time
import uuid
from pathlib import Path

import ktray
from ktray.recipe.load import DEFAULT
from ktray.recipe.schema import Recipe
from ktray.storage.lease import FOLDER, Lease
from ktray.storage.store import Dir, Store

RUNNING = "running.json"


def task_title(recipe: Recipe) -> str:
    """The recipe's task in a run's id: its name or the stem of its data, 24 letters, digits and dashes at most."""
    task = recipe.task.name or Path(str(recipe.task.data or DEFAULT)).stem
    return "".join(c if c.isalnum() else "-" for c in task)[:24]


def open_run(store: Store, same: str, title: str, until: contextlib.ExitStack) -> tuple[str, Dir]:
    """Id and folder of a run, which is this job's until the stack is closed. Who ends the run deletes `RUNNING`.

    Args:
        same: digest of what the run is to do.
        title: last part of a new run's id.
    """
    for name in reversed(store.sub("runs").children()):
        folder = store.run(name)
        if _recipe(folder) == same and _take(folder, until, wait=False):
            if _recipe(folder) == same:
                return name, folder
            _give_back(folder)  # it was finished just now
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{title}-{uuid.uuid4().hex[:4]}"
    folder = store.run(run_id)
    _take(folder, until, wait=True)
    folder.write_json(RUNNING, {"recipe": same, "ktray": ktray.__version__})
    return run_id, folder


def _recipe(folder: Dir) -> str | None:
    try:
        return str(folder.read_json(RUNNING).get("recipe"))
    except (FileNotFoundError, ValueError):
        return None


def _take(folder: Dir, until: contextlib.ExitStack, wait: bool) -> bool:
    lease = Lease(folder)
    if not lease.acquire(wait):
        return False
    until.callback(_give_back, folder)
    until.callback(lease.release)
    return True


def _give_back(folder: Dir) -> None:
    if not folder.exists(RUNNING):  # nobody will ask for it again
        folder.delete(FOLDER)
