"""The steps that every job takes first: check the store, connect to the cluster, and find its part of the cluster."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from ktray.distributed.allocation import Allocation, cluster_allocation, cluster_memory, others
from ktray.distributed.autoscale import gathered
from ktray.distributed.connect import connect
from ktray.distributed.device_workers import WORKERS
from ktray.distributed.doctor.run import require
from ktray.recipe.schema import Recipe
from ktray.storage.store import Store

logger = logging.getLogger("ktray")


@dataclass(frozen=True)
class Session:
    """What a job works with.

    Attributes:
        store: the store of the recipe; it is writable.
        allocation: the part of the cluster that the job uses.
        jobs: the number of jobs that share the cluster.
    """

    store: Store
    allocation: Allocation
    jobs: int = 1

    @property
    def memory(self) -> float:
        """The job's share of the cluster's memory, bytes; 0 where Ray does not report it."""
        return cluster_memory(self.jobs)


@contextlib.contextmanager
def open_session(recipe: Recipe, debug: bool = False, allocation: Allocation | None = None) -> Iterator[Session]:
    """Connect to the cluster, wait for the machines that the recipe requests, and keep them while the block runs.

    Args:
        allocation: the part of the cluster that an outer job assigned to this one, after it waited for the machines
            and checked them; None: this is the outer job.

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
    with gathered(part), contextlib.ExitStack() as until:
        until.callback(WORKERS.end)
        require(recipe)
        whole = cluster_allocation(part.span, part.use_gpu, part.jobs, part.gpu_share)
        if hint := others(part.jobs):
            logger.info(f"cluster   {hint}")
        yield Session(store, whole, part.jobs)
