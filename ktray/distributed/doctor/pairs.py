"""The check whether two nodes can train together: an all-reduce between them, as DDP does it."""

from __future__ import annotations

import itertools
import socket
from datetime import timedelta
from typing import Any

_SECONDS = 60  # time limit of each step, in which the processes of two nodes also start and import torch
_PARTNER = 5.0  # seconds within which the other rank should end after one rank has failed
_NUMBERS = 1 << 20  # 4 MB


def pairs(nodes: list[str], every: bool) -> list[tuple[str, str]]:
    """All pairs of nodes, or, without ``every``, each node with the next one."""
    if every:
        return list(itertools.combinations(nodes, 2))
    return [(nodes[i], nodes[i + 1]) for i in range(len(nodes) - 1)]


def meeting_place() -> tuple[str, int]:
    """An address and a free port of this node, where the two ranks can connect."""
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), int(free.getsockname()[1])


def all_reduce(rank: int, place: tuple[str, int], backend: str) -> float:
    """Take part in an all-reduce as one of two ranks. Returns the mean of both ranks' numbers, which should be 1.5.

    Raises:
        Exception: any error of the backend.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cuda" if backend == "nccl" else "cpu")
    url = f"tcp://{place[0]}:{place[1]}"
    dist.init_process_group(backend, init_method=url, rank=rank, world_size=2, timeout=timedelta(seconds=_SECONDS))
    try:
        numbers = torch.full((_NUMBERS,), float(rank + 1), device=device)
        dist.all_reduce(numbers)
        return float(numbers.mean() / 2)
    finally:
        dist.destroy_process_group()


def meet(left: str, right: str, on: Any, gpus: bool) -> str | None:
    """None if the two nodes can all-reduce, else the reason why they cannot.

    Args:
        left, right: ids of the nodes.
        on: (function, node, gpus) -> a remote function that runs on the node.
        gpus: whether to use NCCL and one GPU of each node; otherwise gloo.
    """
    import ray

    refs: list[Any] = []
    try:
        place = ray.get(on(meeting_place, left).remote(), timeout=_SECONDS)
        backend = "nccl" if gpus else "gloo"
        refs = [on(all_reduce, n, float(gpus)).remote(r, place, backend) for r, n in enumerate((left, right))]
        means = ray.get(refs, timeout=3 * _SECONDS)
    except Exception as error:  # NCCL, gloo and Ray have many kinds of errors
        # After one rank fails, the other ends soon. Wait for it, because Ray's driver dies if a task ends while it is
        # being cancelled.
        for ref in ray.wait(refs, num_returns=len(refs), timeout=_PARTNER)[1] if refs else ():
            ray.cancel(ref, force=True)
        if isinstance(error, ray.exceptions.GetTimeoutError):
            return "no answer in time" + (" (check that each node has a free GPU)" if gpus else "")
        return " ".join(str(error).split())[-300:] or type(error).__name__
    return None if means == [1.5, 1.5] else f"the means should be 1.5 and are {means}"
