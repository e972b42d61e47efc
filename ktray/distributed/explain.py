"""One line that explains a failure, without the errors that Ray wraps around it."""

from __future__ import annotations

from ktray.errors import MARK, KtrayError, first_failed


def explain(error: BaseException) -> str:
    """One line: the `KtrayError` in the chain of Ray's wrappers if there is one, else the innermost cause.

    If several training workers failed, it is the error of the worker that caused the others to fail (`first_failed`).
    """
    if found := user_error(error):
        return str(found)
    chain = _chain(error)
    for link in chain:
        failures = getattr(link, "worker_failures", None)
        if failures:
            rank = first_failed(failures)
            return f"rank {rank} of the training workers: {explain(failures[rank])}"
    for link in chain:
        # Ray re-raises errors of workers as text if they cannot be pickled.
        text = str(link)
        if MARK in text:
            return text.rsplit(MARK, 1)[1].strip().splitlines()[0]
    for link in chain:
        if isinstance(link, OSError) and link.errno:
            from ktray.storage.store import storage_error

            return str(storage_error(link, str(link.filename or "store")))
    last = chain[-1]
    text = " ".join(str(last).split()) or type(last).__name__
    where = next(
        (f"on {link.ip}, process {link.pid}; " for link in chain if hasattr(link, "ip") and hasattr(link, "pid")), ""
    )
    return f"{type(last).__name__}: {text[-400:]} ({where}run with --debug to see the traceback)"


def user_error(error: BaseException) -> KtrayError | None:
    """The `KtrayError` in the chain of Ray's wrappers; None if there is none."""
    # Ray's wrapper is also a KtrayError, with the worker's traceback as its text.
    return next((link for link in _chain(error) if isinstance(link, KtrayError) and MARK not in str(link)), None)


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
