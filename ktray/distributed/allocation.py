"""The allocation: how a job divides the CPUs and GPUs of a cluster so that its stages cannot deadlock.

Ray does not report a stage that waits for a CPU that its own workers hold; the stage hangs. Each stage therefore
requests shares that were checked beforehand to fit. If they cannot fit, the job ends with an error that shows the
numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ktray.errors import ResourceError


@dataclass(frozen=True)
class Allocation:
    """Shares of the cluster. CPUs are Ray's logical CPUs.

    Attributes:
        least, workers: minimum and maximum number of training workers.
        actors: number of device workers (teachers), with ``actor_cpus`` and ``actor_gpus`` each.
        decode_cpus: CPUs of a task that reads and decodes images.
        worker_threads, actor_threads: threads of torch in a training worker and in a device worker.
        streaming: number of teachers that may run for each training worker during training; 0 if training uses all
            GPUs.
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
        device = "CPU"
        if self.worker_gpus:
            device = "GPU" if self.worker_gpus == 1 else f"{self.worker_gpus:g} of a GPU"
        teachers = f"{self.actors} teacher {'actors' if self.actor_gpus else 'tasks'} of {self.actor_cpus:g} CPU"
        return (
            f"cluster   {self.total_cpus:g} CPUs, {self.total_gpus:g} GPUs: "
            f"{self.workers if self.least == self.workers else f'{self.least}..{self.workers}'} training worker(s) "
            f"on {device} "
            f"with {self.worker_cpus:g} CPUs each, {teachers}, "
            f"decode tasks of {self.decode_cpus:g} CPU"
        )


# Memory of each copy of a teacher on a CPU: torch, the model (a ViT-L takes 1.2 GB) and the pixels of a batch.
TEACHER_BYTES = 4e9


def allocate(
    cpus: float,
    gpus: float,
    nodes: int,
    workers: int | tuple[int, int],
    use_gpu: bool | str,
    memory: float = math.inf,
    gpu_share: float = 1.0,
) -> Allocation:
    """Divide a cluster. Training workers leave CPUs for reading, so that a decode task always fits.

    Teachers on GPUs are actors, which hold a share of the CPUs as long as they live. Teachers on CPUs are tasks, as
    many as CPUs and memory allow. A task holds nothing between two shards, so decoding has all CPUs while no pixels are
    ready; with one thread each, the tasks do not wait for each other.

    Args:
        cpus, gpus, nodes: size of the cluster, or of the job's part of it; it may be less than one GPU.
        workers: number of training workers, or their minimum and maximum. With a range, each worker has a GPU or, on
            CPUs, most of a node, so that as many workers fit as there are GPUs or nodes.
        use_gpu: whether training uses GPUs; ``"auto"``: if there are any.
        memory: memory of the cluster, in bytes.
        gpu_share: share of a GPU that each training worker and each teacher takes; a job with less than one GPU takes
            no more than it has.

    Raises:
        ResourceError: the shares cannot fit; the message shows the numbers.
    """
    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    elastic = least < most
    on_gpu = gpus > 0 if use_gpu == "auto" else bool(use_gpu)
    if gpu_share < 1:  # a whole number of shares on each GPU
        gpu_share = 1 / math.floor(1 / gpu_share + 1e-9)
    gpu_share = min(gpu_share, gpus) if on_gpu and gpus else gpu_share
    slots = int(gpus / gpu_share + 1e-9)
    if on_gpu and slots < least:
        raise ResourceError(
            f"{least} training workers need {least * gpu_share:g} GPUs, but the cluster has {gpus:g}",
            f"Set cluster.workers={slots} or cluster.use_gpu=false."
            if slots
            else "Set cluster.use_gpu=false, or use a cluster with a GPU.",
        )
    if on_gpu and gpu_share < 1 and most > 1:
        raise ResourceError(
            f"{most} training workers of one run cannot share a GPU, because NCCL needs one for each; here each has "
            f"{gpu_share:g}",
            "Set cluster.workers=1 with cluster.gpu_share, or leave cluster.gpu_share at 1.",
        )
    if cpus <= 0:
        raise ResourceError(
            "The cluster has no CPU for work",
            "Start a node with CPUs (ray start --num-cpus=N), or request CPUs from an autoscaling cluster "
            "(cluster.cpus=16 cluster.gpus=1).",
        )
    if elastic and not on_gpu and nodes < least:
        raise ResourceError(
            f"cluster.workers={least}..{most} on CPUs needs one node for each worker, so at least {least} nodes, but "
            f"the cluster has {nodes}",
            f"Set cluster.workers={nodes}..{most}, or a fixed number of workers, which can share a node.",
        )
    count = min(most, max(least, slots if on_gpu else nodes)) if elastic else most
    # At least half of the CPUs are left for reading, and at least one if there are two.
    worker_cpus = min(1.0, int(50 * cpus / count) / 100)
    if elastic and on_gpu:
        worker_cpus = 2.0 ** min(0, math.floor(math.log2(cpus / 2 / count)))  # so that Ray Train's sums are exact
    elif elastic:
        worker_cpus = int(60 * cpus / nodes) / 100  # two would not fit on a node
    # The CPUs of the largest reading task. At least one node has no more than an even share of a fixed number of
    # workers. With a range of workers, the task may have to share its node with one worker.
    workers_per_node = 1 if elastic else count // nodes
    reading_cpus = min(cpus / 2, cpus / nodes - workers_per_node * worker_cpus)
    if worker_cpus < 0.02:
        raise ResourceError(
            f"{count} training workers do not fit on {cpus:g} CPUs: each would get {cpus / 2 / count:.3f} CPUs, and "
            "the minimum is 0.02",
            f"Set cluster.workers to at most {int(cpus / 2 / 0.02)}.",
        )
    if on_gpu:
        actors = max(1, slots)
        actor_cpus = min(1.0, cpus / 2 / actors)
        decode_cpus = min(1.0, cpus - actors * actor_cpus)
    else:
        actors = max(1, int(min(cpus, memory // TEACHER_BYTES)))
        actor_cpus = decode_cpus = min(1.0, reading_cpus)
    left = cpus - count * worker_cpus
    # A teacher that runs during training has its own GPU. On CPUs, teachers and reading share the CPUs that training
    # leaves.
    streaming = int((slots - most) // most) if on_gpu else max(1, min(actors, int(left / decode_cpus / count)))
    cores_per_node = max(1, int(cpus / max(1, nodes)))
    return Allocation(
        total_cpus=cpus,
        total_gpus=gpus,
        least=least,
        workers=most,
        worker_cpus=worker_cpus,
        worker_gpus=gpu_share if on_gpu else 0.0,
        actors=actors,
        actor_cpus=actor_cpus,
        actor_gpus=gpu_share if on_gpu else 0.0,
        decode_cpus=decode_cpus,
        # A process cannot use more cores than its node has.
        worker_threads=max(1, min(cores_per_node, cores_per_node * nodes // count)),
        actor_threads=max(1, min(cores_per_node, cores_per_node * nodes // actors)),
        streaming=max(0, streaming),
    )


def cluster_allocation(
    workers: int | tuple[int, int], use_gpu: bool | str, jobs: int = 1, gpu_share: float = 1.0
) -> Allocation:
    """`allocate` for the cluster that Ray is connected to, or for the part of it that each of ``jobs`` jobs has.

    While a job reads, it holds at most half of the CPUs of its part, and no GPU of another job. If two jobs both
    planned with the whole cluster, they could hold all of it together, and both would wait for ever for a reading task
    or for a teacher's GPU. Jobs that outnumber the GPUs share them.
    """
    import ray

    total = ray.cluster_resources()
    cpus, gpus, memory = (float(total.get(name, 0.0)) for name in ("CPU", "GPU", "memory"))
    # A head node without CPUs for work and nodes that have left the cluster do not count.
    working = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
    part = gpus_for_each(gpus, jobs)
    return allocate(cpus / jobs, part, max(1, working // jobs), workers, use_gpu, memory / jobs, gpu_share)


def gpus_for_each(gpus: float, jobs: int) -> float:
    """The GPUs of each of ``jobs`` jobs: whole ones, or an equal share of one where there are fewer GPUs than jobs."""
    return float(gpus // jobs) or gpus / jobs


def cluster_memory(jobs: int = 1) -> float:
    """Memory in bytes that each of ``jobs`` jobs has on the connected cluster; 0 if Ray does not know it."""
    import ray

    return float(ray.cluster_resources().get("memory", 0.0)) / jobs


def worker_memory(allocation: Allocation, jobs: int = 1) -> float:
    """Memory in bytes of each training worker on the machine with the least memory, if ``jobs`` jobs spread their
    workers evenly over the machines; 0 if Ray does not know it."""
    import ray

    kind = "GPU" if allocation.worker_gpus else "CPU"
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind)]
    least = min((float(node.get("memory", 0.0)) for node in nodes), default=0.0)
    return least / max(1, -(-allocation.workers * jobs // max(1, len(nodes))))


def others(jobs: int) -> str | None:
    """A hint for the user if other jobs hold a part of the cluster and this job plans with all of it, else None."""
    import ray

    total, free = (resources.get("CPU", 0.0) for resources in (ray.cluster_resources(), ray.available_resources()))
    if jobs > 1 or total - free < 0.01:
        return None
    return (
        f"other jobs hold {total - free:g} of {total:g} CPUs; if N jobs share the cluster, start each of them with "
        "cluster.jobs=N, or they may wait for each other without end"
    )
