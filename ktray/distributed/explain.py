"""One line for a failure, whatever Ray wrapped around it."""

from __future__ import annotations

from ktray.errors import MARK, KtrayError, first_failed


def explain(error: BaseException) -> str:
    """One line: the user's error somewhere in a chain of Ray's wrappers, or the innermost cause.

    Of several training workers that failed, the one that the others failed by (see `first_failed`).
    """
    chain: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop(0)
        if one is None or one in chain:
            continue
        chain.append(one)
        todo += [one.__cause__, *(getattr(one, name, None) for name in _INNER), one.__context__]
    for one in chain:
        # Ray's wrapper is a KtrayError too, with the worker's traceback as its text.
        if isinstance(one, KtrayError) and MARK not in str(one):
            return str(one)
    for one in chain:
        failures = getattr(one, "worker_failures", None)
        if failures:
            rank = first_failed(failures)
            return f"rank {rank} of the training workers: {explain(failures[rank])}"
    for one in chain:
        # Ray re-raises errors of workers as text when they do not pickle.
        text = str(one)
        if MARK in text:
            return text.rsplit(MARK, 1)[1].strip().splitlines()[0]
    for one in chain:
        if isinstance(one, OSError) and one.errno:
            from ktray.storage.store import storage_error

            return str(storage_error(one, str(one.filename or "store")))
    last = chain[-1]
    text = " ".join(str(last).split()) or type(last).__name__
    where = next(
        (f"on {one.ip}, process {one.pid}; " for one in chain if hasattr(one, "ip") and hasattr(one, "pid")), ""
    )
    return f"{type(last).__name__}: {text[-400:]} ({where}--debug shows where)"


_INNER = ("cause", "controller_failure", "health_check_failure")  # where Ray's errors keep what they wrap
