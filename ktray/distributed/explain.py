"""One line that explains a failure, without the errors that Ray wraps around it."""

from __future__ import annotations

import errno
import re

from ktray.errors import MARK, KtrayError, ResourceError, first_failed

DONE, FAULT, INPUT, RESOURCES, INTERRUPTED = 0, 1, KtrayError.exit_code, ResourceError.exit_code, 4
"""Exit codes: done; a fault of ktray; a mistake in the input; the cluster, a machine or a disk; interrupted."""

OOM_RETRIES = 5
"""How often Ray repeats a task that ran out of memory; Ray's default is no limit."""

# Errors of Ray that say that a process, a machine or its memory was lost.
_LOST = re.compile(
    r"OutOfMemory|WorkerCrashed|ActorDied|ActorUnavailable|NodeDied|ObjectLost|ObjectStoreFull|RaySystem"
)
# Not errors: the end of an iteration, during which the error appeared, and Ray Data's wrapper without a text.
_ENDS = ("StopIteration", "StopAsyncIteration", "GeneratorExit", "ObjectRefStreamEndOfStreamError", "SystemException")
# Ray Data's advice to retry, which it appends to the message of an error.
_RETRIES = re.compile(r"\s*Failed to apply UDF transform after .*", re.DOTALL)
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EROFS)


def explain(error: BaseException) -> str:
    """One line: the `KtrayError` in the chain of Ray's wrappers if there is one, else the innermost cause.

    If several training workers failed, it is the error of the worker that caused the others to fail (`first_failed`).
    """
    return _explain(error)[0]


def exit_code(error: BaseException) -> int:
    """The exit code for an error that ended a job, one of those above."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return _explain(error)[1]


def _explain(error: BaseException) -> tuple[str, int]:
    if found := user_error(error):
        return str(found), found.exit_code
    chain = _chain(error)
    for link in chain:
        failures = getattr(link, "worker_failures", None)
        if failures:
            rank = first_failed(failures)
            text, code = _explain(failures[rank])
            return f"rank {rank} of the training workers: {text}", code
    for link in chain:
        # Ray re-raises errors of workers as text if they cannot be pickled.
        marks = list(MARK.finditer(str(link)))
        if marks:
            code = RESOURCES if marks[-1][1] == ResourceError.__name__ else INPUT
            return str(link)[marks[-1].end() :].strip().splitlines()[0], code
    for link in chain:
        if isinstance(link, OSError) and link.errno:
            from ktray.storage.store import storage_error

            code = INPUT if link.errno in _NO_FILE else FAULT
            if link.errno in _FULL or isinstance(link, ConnectionError | TimeoutError):
                code = RESOURCES
            return str(storage_error(link, str(link.filename or "store"))), code
    for link in chain:
        # torch has an error of the same name, for the memory of a GPU.
        if type(link).__name__ == "OutOfMemoryError" and type(link).__module__.startswith("ray."):
            return str(out_of_memory("A task", link)), RESOURCES
    last = ([link for link in chain if type(link).__name__ not in _ENDS] or chain)[-1]
    said = str(last.args[0]) if isinstance(last, KeyError) and last.args else str(last)  # without its quotation marks
    text = " ".join(_RETRIES.sub("", said).split()) or type(last).__name__
    where = next(
        (f"on {link.ip}, process {link.pid}; " for link in chain if hasattr(link, "ip") and hasattr(link, "pid")), ""
    )
    lost = any(_LOST.search(type(link).__name__) or isinstance(link, MemoryError) for link in chain)
    line = f"{type(last).__name__}: {text[-400:]} ({where}run with --debug to see the traceback)"
    return line, RESOURCES if lost or isinstance(last, ConnectionError | TimeoutError) else FAULT


def out_of_memory(what: str, error: BaseException, attempts: int = 0, remedy: str = "") -> ResourceError:
    """The error for work that Ray's memory monitor ended.

    Args:
        what: what was ended, at the beginning of a sentence.
        error: Ray's `OutOfMemoryError`, whose text says how much memory its machine has.
        attempts: how often it was tried; 0: the number is not known, because Ray repeated it.
        remedy: what to change, as a sentence.
    """
    used = re.search(r"was (\S+ used / \S+) limit", str(error))
    times = f" in {attempts} attempt{'s' if attempts > 1 else ''}" if attempts else " in every attempt"
    return ResourceError(
        f"{what} ran out of memory{times} ({used[1] if used else 'all'} on its machine)",
        remedy
        or "Use machines with more memory for each CPU, start Ray with fewer CPUs (--num-cpus), or end other programs; "
        "finished parts are kept.",
    )


def user_error(error: BaseException) -> KtrayError | None:
    """The `KtrayError` in the chain of Ray's wrappers; None if there is none."""
    # Ray's wrapper is also a KtrayError, with the worker's traceback as its text.
    return next((link for link in _chain(error) if isinstance(link, KtrayError) and not MARK.search(str(link))), None)


def _chain(error: BaseException) -> list[BaseException]:
    """The error and all errors that it wraps."""
    chain: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        link = todo.pop(0)
        if link is None or link in chain:
            continue
        chain.append(link)
        todo += [link.__cause__, *(getattr(link, name, None) for name in _INNER), link.__context__]
    return chain


_INNER = ("cause", "controller_failure", "health_check_failure")  # attributes in which Ray's errors keep their causes
