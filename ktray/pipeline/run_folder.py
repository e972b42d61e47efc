"""Open the folder of a run: that of an unfinished run of the same recipe, or a new folder. A folder that another job
uses is never taken."""

from __future__ import annotations

import contextlib
import time
import uuid
from pathlib import Path

import ktray
from ktray.recipe.load import DEFAULT
from ktray.recipe.schema import Recipe
from ktray.reporting.result import utc
from ktray.storage.clock import stamp
from ktray.storage.lease import FOLDER, Lease
from ktray.storage.store import Dir, Store

RUNNING = "running.json"


def task_title(recipe: Recipe) -> str:
    """The task as part of a run id: its name or the stem of its data path, at most 24 letters, digits and dashes."""
    task = recipe.task.name or Path(str(recipe.task.data or DEFAULT)).stem
    return "".join(c if c.isalnum() else "-" for c in task)[:24]


def open_run(store: Store, same: str, title: str, until: contextlib.ExitStack) -> tuple[str, Dir]:
    """Return the id and the folder of a run. This job holds the folder until ``until`` is closed; the job that finishes
    the run deletes `RUNNING`.

    Args:
        same: digest of everything that the run depends on; an unfinished run with the same digest is continued.
        title: last part of the id of a new run.
        until: the lease of the folder is released when this stack is closed.
    """
    for name in reversed(store.sub("runs").children()):
        folder = store.run(name)
        if _recipe(folder) == same and _take(folder, until, wait=False):
            if _recipe(folder) == same:
                _begin(folder, same)
                return name, folder
            _give_back(folder)  # another job has just finished this run
    run_id = f"{stamp()}-{title}-{uuid.uuid4().hex[:4]}"
    folder = store.run(run_id)
    _take(folder, until, wait=True)
    _begin(folder, same)
    return run_id, folder


def _begin(folder: Dir, same: str) -> None:
    """Note a start of the run. The result of an earlier attempt goes, so that what is there is never an old one's."""
    earlier = folder.read_json(RUNNING).get("starts", []) if folder.exists(RUNNING) else []
    folder.write_json(RUNNING, {"recipe": same, "ktray": ktray.__version__, "starts": [*earlier, utc(time.time())]})
    folder.delete("result.json")


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
    if not folder.exists(RUNNING):  # the run is finished, so no job will need the lease again
        folder.delete(FOLDER)
