"""The time of a model on a device whose speed was not measured: from its arithmetic and its memory traffic.

Eager PyTorch does not overlap the operations that wait for arithmetic with those that wait for memory, so the two times
are added. Against one NVIDIA H200, training of a ViT-S/16 is planned 16% too fast, a forward pass of a ViT-L/14 40% too
slow, and training of FastViT-S12 three and a half times too fast: grouped convolutions use a GPU badly.
"""

from __future__ import annotations

from dataclasses import dataclass

_COMPUTE, _MEMORY = 0.6, 0.8  # shares of the data sheet that large matrix products and copies reach
_VALUE_BYTES = 2  # bf16


@dataclass(frozen=True)
class DataSheet:
    """``flops``: FLOP/s of dense matrix products in bf16 (T4: fp16); ``bandwidth``: bytes/s of the memory."""

    flops: float
    bandwidth: float


# NVIDIA's data sheets, dense.
GPUS = {
    "H200": DataSheet(989e12, 4.8e12),
    "H100": DataSheet(989e12, 3.35e12),
    "A100": DataSheet(312e12, 1.55e12),
    "L40S": DataSheet(362e12, 0.864e12),
    "L4": DataSheet(121e12, 0.30e12),
    "A10G": DataSheet(70e12, 0.60e12),
    "T4": DataSheet(65e12, 0.32e12),
}
OTHER_GPU = DataSheet(121e12, 0.30e12)
CORE_RATE = 30e9  # FLOP/s of a CPU core in fp32; small models reach between 10 and 60 GFLOP/s in measurements


def family(name: str) -> str | None:
    """The key of `GPUS` for the name of a GPU, such as ``H100`` for ``NVIDIA H100 80GB HBM3``; None if it has none."""
    return max((gpu for gpu in GPUS if gpu in name), key=len, default=None)


def gpu_seconds(flops: float, values: float, name: str) -> float:
    """Seconds on a GPU.

    Args:
        flops: FLOPs.
        values: values that are read and written (`ktray.models.traffic`).
        name: name of the GPU as CUDA reports it.
    """
    found = family(name)
    sheet = GPUS[found] if found else OTHER_GPU
    return flops / (_COMPUTE * sheet.flops) + values * _VALUE_BYTES / (_MEMORY * sheet.bandwidth)


def cpu_seconds(flops: float, cores: float) -> float:
    """Seconds on the cores of a machine without GPUs."""
    return flops / (CORE_RATE * cores)
