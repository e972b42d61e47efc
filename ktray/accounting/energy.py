"""The energy that this machine's GPUs have used."""

from __future__ import annotations

from collections.abc import Callable


def gpu_joules() -> Callable[[], float] | None:
    """A counter of the energy in joules that this machine's GPUs (those torch sees) have used; None if there is none.

    It reads NVML's own counter (`nvmlDeviceGetTotalEnergyConsumption`, Volta and newer). It does not cover the GPUs of
    other machines: their workers report energy with `Meter.add`.
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
