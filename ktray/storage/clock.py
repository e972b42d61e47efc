"""Times in names: UTC, because machines in several time zones share a store and the newest is found by its name."""

from __future__ import annotations

import time


def stamp() -> str:
    """The time now, as the beginning of a name: ``20261128-171429``, in UTC. Sorted names are in order of time."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime())


def day() -> str:
    """The date now: ``2026-11-28``, in UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime())
