"""Where work runs: connecting to Ray, and a plan of CPUs and GPUs that cannot deadlock.

Ray never reports that a stage waits for a CPU that its own workers hold; it just hangs. So each stage asks for
shares that were checked to fit beforehand, and one that cannot fit ends with the arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ktray.errors import KtrayError


@dataclass(frozen=True)
class Allocation:
    """Shares of the cluster. CPU figures are Ray's logical CPUs.

    Attributes:
        least, workers: the fewest and the most training workers.
        streaming: teachers that may work beside each training worker; 0 where its GPUs are all in training.
    """

    total_cpus: float
    total_gpus: float
    least: int
    workers: int
    worker_cpus: float
    worker_gpus: float
    actors: int
    actor_cpus: float
    actor_gpus: float
    decode_cpus: float
    worker_threads: int
    actor_threads: int
    streaming: int

    @property
    def line(self) -> str:
        """One line for the terminal."""
        device = "GPU" if self.worker_gpus else "CPU"
        teachers = f"{self.actors} teacher {'actors' if self.actor_gpus else 'tasks'} of {self.actor_cpus:g} CPU"
        return (
            f"cluster   {self.total_cpus:g} CPUs, {self.total_gpus:g} GPUs: "
            f"{self.workers if self.least == self.workers else f'{self.least}..{self.workers}'} training worker(s) "
            f"on {device} "
            f"with {self.worker_cpus:g} CPUs each, {teachers}, "
            f"decode tasks of {self.decode_cpus:g} CPU"
        )


# For each copy of a teacher on a CPU: torch, the model (a ViT-L takes 1.2 GB) and the pixels it is given.
BYTES_A_TEACHER = 4e9


def allocate(
    cpus: float, gpus: float, nodes: int, workers: int | tuple[int, int], use_gpu: bool | str, memory: float = math.inf
) -> Allocation:
    """Divide a cluster. Training workers leave CPUs for reading; a decode task always has room.

    Teachers on GPUs are actors, which hold a CPU share while they live. On CPUs they are tasks, as many as there are
    CPUs and memory for: they hold nothing between shards, so that decoding has all CPUs while no pixels are there, and
    one thread each wastes none of them on waiting for the others.

    Args:
        workers: how many, or the fewest and the most. Of a range each has a GPU or, on CPUs, most of a node, so that as
            many fit as there are such.
        memory: of the cluster, in bytes.

    Raises:
        KtrayError: it cannot fit; with the arithmetic.
    """
    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    elastic = least < most
    on_gpu = gpus > 0 if use_gpu == "auto" else bool(use_gpu)
    if on_gpu and gpus < least:
        raise KtrayError(
            f"{least} training workers need {least} GPUs and the cluster has {gpus:g}",
            f"Set cluster.workers={int(gpus)}, or cluster.use_gpu=false.",
        )
    if cpus <= 0:
        raise KtrayError(
            "The cluster offers no CPU",
            "Start a node with CPUs (ray start --num-cpus=N), or ask an autoscaling cluster for some "
            "(cluster.cpus=16 cluster.gpus=1).",
        )
    if elastic and not on_gpu and nodes < least:
        raise KtrayError(
            f"cluster.workers={least}..{most} on CPUs is one worker a node, and the cluster has {nodes} of at least "
            f"{least}",
            f"Set cluster.workers={nodes}..{most}, or a fixed number of workers, which may share a node.",
        )
    now = min(most, max(least, int(gpus) if on_gpu else nodes)) if elastic else most
    # At least half of the CPUs, and never less than one where there are two, stay for reading.
    worker_cpus = min(1.0, int(50 * cpus / now) / 100)
    if elastic and on_gpu:
        worker_cpus = 2.0 ** min(0, math.floor(math.log2(cpus / 2 / now)))  # so that Ray Train's sums are exact
    elif elastic:
        worker_cpus = int(60 * cpus / nodes) / 100  # two would not fit on a node
    # What the largest reading task may have. One of the nodes has at most an even share of the workers; of those that
    # come and go it may have to be on a node with one.
    a_node = 1 if elastic else now // nodes
    beside = min(cpus / 2, cpus / nodes - a_node * worker_cpus)
    if worker_cpus < 0.02:
        raise KtrayError(
            f"{now} training workers do not fit on {cpus:g} CPUs: each would get {cpus / 2 / now:.3f}, "
            "0.02 is the least",
            f"Set cluster.workers to at most {int(cpus / 2 / 0.02)}.",
        )
    if on_gpu:
        actors = max(1, int(gpus))
        actor_cpus = min(1.0, cpus / 2 / actors)
        decode_cpus = min(1.0, cpus - actors * actor_cpus)
    else:
        actors = max(1, int(min(cpus, memory // BYTES_A_TEACHER)))
        actor_cpus = decode_cpus = min(1.0, beside)
    left = cpus - now * worker_cpus
    # A teacher beside the training has a GPU of its own; on CPUs it shares what training leaves with the reading.
    streaming = int((gpus - most) // most) if on_gpu else max(1, min(actors, int(left / decode_cpus / now)))
    cores_a_node = max(1, int(cpus / max(1, nodes)))
    return Allocation(
        total_cpus=cpus,
        total_gpus=gpus,
        least=least,
        workers=most,
        worker_cpus=worker_cpus,
        worker_gpus=1.0 if on_gpu else 0.0,
        actors=actors,
        actor_cpus=actor_cpus,
        actor_gpus=1.0 if on_gpu else 0.0,
        decode_cpus=decode_cpus,
        # Nobody has more cores than a node.
        worker_threads=max(1, min(cores_a_node, cores_a_node * nodes // now)),
        actor_threads=max(1, min(cores_a_node, cores_a_node * nodes // actors)),
        streaming=max(0, streaming),
    )


def cluster_allocation(workers: int | tuple[int, int], use_gpu: bool | str, jobs: int = 1) -> Allocation:
    """`allocate` for the cluster that Ray is connected to, or for the part of it that each of ``jobs`` has.

    What a job holds while it reads is at most half of its part's CPUs and no GPU of another's. Two that both plan with
    the whole can between them hold all there is, and then both wait for a reading task, or a teacher's GPU, for ever.
    """
    import ray

    total = ray.cluster_resources()
    cpus, gpus, memory = (float(total.get(name, 0.0)) for name in ("CPU", "GPU", "memory"))
    # A head that is kept free of work, and nodes that have left, have no cores for anyone.
    working = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
    return allocate(cpus / jobs, gpus // jobs, max(1, working // jobs), workers, use_gpu, memory / jobs)


def cluster_memory(jobs: int = 1) -> float:
    """Bytes of memory that each of ``jobs`` has on the cluster that Ray is connected to; 0 where Ray does not know."""
    import ray

    return float(ray.cluster_resources().get("memory", 0.0)) / jobs


def others(jobs: int) -> str | None:
    """A hint where other jobs hold a part of the cluster and this one plans with all of it."""
    import ray

    total, free = (found.get("CPU", 0.0) for found in (ray.cluster_resources(), ray.available_resources()))
    if jobs > 1 or total - free < 0.01:
        return None
    return (
        f"other jobs hold {total - free:g} of {total:g} CPUs; jobs at once can end up waiting for each other unless "
        "each is started with cluster.jobs=N, for N of them"
    )
