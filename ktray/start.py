"""The first lines of every job: they also run in a Python that lacks what ktray needs, and say so in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_NO_PACKAGES = 2  # as a mistake in the command: ktray.distributed.explain.INPUT cannot be imported without them


def start(argv: Sequence[str] | None = None) -> int:
    """Run ``ktray JOB ...``; returns the exit code.

    Args:
        argv: the job and its arguments; None: those of the command line.
    """
    try:
        from ktray import cli
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "ktray":
            raise
        print(
            f"error: {sys.executable} has no package '{error.name}', which ktray needs. Use the Python of ktray's "
            "environment (.venv/bin/python after `python3 -m ktray.bootstrap`); on a cluster, activate the environment "
            "before `ray start`, or write its full path after `--` of `ray job submit`.",
            file=sys.stderr,
        )
        return _NO_PACKAGES
    return cli.entry(argv)
