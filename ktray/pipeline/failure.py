"""What a job that fails leaves: ``result.json`` with the error and its remedy, and a report as far as the run came."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ktray.distributed.explain import INTERRUPTED, exit_code, explain
from ktray.redact import scrub
from ktray.reporting import log
from ktray.reporting.report import write_report
from ktray.reporting.result import SCHEMA, FailedResult, utc, write_result
from ktray.storage.store import Dir

logger = logging.getLogger("ktray")


@contextlib.contextmanager
def failure_recorded(
    folder: Dir, run_id: str, begun: float, state: Callable[[], Mapping[str, Any]] = dict
) -> Iterator[None]:
    """Write the result of a failed job into its run folder when the block ends with an exception.

    Args:
        folder: the run folder.
        begun: time of the start, seconds since 1970.
        state: returns what is known of the run at its end: entries of `FailedResult` such as ``stage`` and ``cost``.
    """
    try:
        yield
    except BaseException as error:
        try:
            _write(folder, run_id, begun, error, state())
        except Exception as second:  # the store itself may be what failed; the first error is reported in any case
            logger.debug(f"result    {folder.file('result.json')} could not be written: {second}")
        raise


def _write(folder: Dir, run_id: str, begun: float, error: BaseException, state: Mapping[str, Any]) -> None:
    code = exit_code(error)
    if code == INTERRUPTED:
        what, remedy = "The job was interrupted", "The same command resumes it."
    else:
        line = str(scrub(explain(error)))
        remedy = str(scrub(_remedy(error)))
        what = line.removesuffix(remedy).rstrip().removesuffix(".") if remedy else line
    result = FailedResult(
        **{
            "schema": SCHEMA,
            "run_id": run_id,
            "folder": folder.uri,
            "status": "interrupted" if code == INTERRUPTED else "failed",
            "error": what,
            "remedy": remedy,
            "stage": None,
            "exit_code": code,
            "started": utc(begun),
            "ended": utc(time.time()),
            **state,
        }
    )
    content = write_result(folder, result)
    with tempfile.TemporaryDirectory(prefix="ktray-") as scratch:
        page = write_report(Path(scratch), content, curves={}, confusion=None, classes=[], contact_sheet=None, worst=[])
        folder.put(page)
    # Also with --quiet: a script that started the job reads it. Runs of a search in threads are not what it asked for.
    tell = log.result if threading.current_thread() is threading.main_thread() else logger.info
    tell(f"result    {folder.file('result.json')}")


def _remedy(error: BaseException) -> str:
    """The remedy of the error in a chain of exceptions; empty if none has one."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        if remedy := getattr(link, "remedy", ""):
            return str(remedy)
        seen.append(link)
        link = link.__cause__ or getattr(link, "cause", None) or link.__context__
    return ""
