"""Whether nodes can train together: an all-reduce between two of them, as DDP does it."""

from __future__ import annotations

import itertools
import socket
from datetime import timedelta
from typing import Any

_SECONDS = 30
_PARTNER = 5.0  # seconds that one of two has left to end when the other failed
_NUMBERS = 1 << 20  # 4 MB


def pairs(nodes: list[str], every: bool) -> list[tuple[str, str]]:
    """All pairs, or each node with the next."""
    if every:
        return list(itertools.combinations(nodes, 2))
    return [(nodes[i], nodes[i + 1]) for i in range(len(nodes) - 1)]


def meeting_place() -> tuple[str, int]:
    """An address and a free port of this node, for the two to meet at."""
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), int(free.getsockname()[1])


def all_reduce(rank: int, place: tuple[str, int], backend: str) -> float:
    """One of two ranks; the mean of what both gave, which is 1.5. Raises whatever the backend does."""
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
    """None where two nodes can; else why not.

    Args:
        on: (function, node, gpus) -> a remote function that runs there.
    """
    import ray

    refs: list[Any] = []
    try:
        place = ray.get(on(meeting_place, left).remote(), timeout=_SECONDS)
        backend = "nccl" if gpus else "gloo"
        refs = [on(all_reduce, n, float(gpus)).remote(r, place, backend) for r, n in enumerate((left, right))]
        found = ray.get(refs, timeout=3 * _SECONDS)
    except Exception as error:  # whatever NCCL, gloo or Ray say
        # When one fails the other ends soon after, and Ray's driver dies of a task that ends while it is cancelled.
        for ref in ray.wait(refs, num_returns=len(refs), timeout=_PARTNER)[1] if refs else ():
            ray.cancel(ref, force=True)
        if isinstance(error, ray.exceptions.GetTimeoutError):
            return "no answer in time" + (" (has each a free GPU?)" if gpus else "")
        return " ".join(str(error).split())[-300:] or type(error).__name__
    return None if found == [1.5, 1.5] else f"the sum came out as {found}"
