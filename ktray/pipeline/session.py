"""What every job does before its work: it checks the store and the cluster, and plans with its part of the cluster."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from ktray.distributed.allocation import Allocation, cluster_allocation, cluster_memory, others
from ktray.distributed.autoscale import gathered
from ktray.distributed.connect import connect
from ktray.distributed.doctor.run import require
from ktray.recipe.schema import Recipe
from ktray.storage.store import Store

logger = logging.getLogger("ktray")


@dataclass(frozen=True)
class Session:
    """A job that may begin.

    Attributes:
        store: the recipe's; it can be written.
        allocation: the part of the cluster that the job has.
    """

    store: Store
    allocation: Allocation
    jobs: int = 1

    @property
    def memory(self) -> float:
        """Bytes of the cluster's memory that the job has; 0 where Ray does not know."""
        return cluster_memory(self.jobs)


@contextlib.contextmanager
def open_session(recipe: Recipe, debug: bool = False, allocation: Allocation | None = None) -> Iterator[Session]:
    """Connect, wait for the machines that the recipe asks for, and keep them while the block runs.

    Args:
        allocation: the part that a job which runs this one has given it; it has gathered and checked the cluster.

    Raises:
        KtrayError: the store cannot be written, the cluster cannot be reached or is too small, or one of the checks of
            ``jobs/doctor.py`` fails.
    """
    store = Store(recipe.store)
    store.check_writable()
    connect(debug)
    part = recipe.cluster
    if allocation is not None:
        yield Session(store, allocation, part.jobs)
        return
    with gathered(part):
        require(recipe)
        whole = cluster_allocation(part.span, part.use_gpu, part.jobs)
        if hint := others(part.jobs):
            logger.info(f"cluster   {hint}")
        yield Session(store, whole, part.jobs)
