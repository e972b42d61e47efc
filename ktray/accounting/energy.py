"""The energy that this machine's GPUs have used, from NVML."""

from __future__ import annotations

from collections.abc import Callable


def gpu_joules() -> Callable[[], float] | None:
    """A counter of the energy in joules that this machine's GPUs (those torch sees) have used; None if there is none.

    It reads NVML's own counter (`nvmlDeviceGetTotalEnergyConsumption`, Volta and newer). It does not cover the GPUs of
    other machines (`ktray.distributed.energy`).
    """
    try:
        import pynvml
        import torch

        if not torch.cuda.is_available():
            return None
        pynvml.nvmlInit()
        ids = [torch.cuda.get_device_properties(i).uuid for i in range(torch.cuda.device_count())]
        handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{i}") for i in ids]

        def read() -> float:
            return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1000

        read()
    except Exception:  # NVML can fail for many reasons (driver, container, old card); energy is then not measured
        return None
    return read


def node_joules() -> float | None:
    """The joules that all GPUs of this machine have used since their driver was loaded, from a process without a GPU of
    its own; None if one of them has no counter."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return sum(float(pynvml.nvmlDeviceGetTotalEnergyConsumption(h)) for h in handles) / 1000
    except Exception:  # see above
        return None
