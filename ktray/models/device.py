"""The device of this process.

In a Ray worker it is what Ray assigned to the task or actor, which is not the same as what torch sees: without an
assigned GPU, a task still sees all GPUs of its machine, and would take memory on a GPU that belongs to another job.
"""

from __future__ import annotations

import torch

_assigned: bool | None = None  # None: nobody has assigned devices, as in a notebook


def assign(gpu: bool) -> None:
    """Set whether this process may use a GPU. `ktray.distributed.assigned` calls it in every worker and driver."""
    global _assigned
    _assigned = gpu


def device() -> torch.device:
    """The GPU of this process, or else the CPU."""
    may = _assigned is not False
    return torch.device("cuda" if may and torch.cuda.is_available() else "cpu")
