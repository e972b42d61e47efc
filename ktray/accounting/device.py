"""The machine of a run: its hardware, the part of it that this process may use, and the memory that was used.

`describe_device` returns no host names and no addresses, because its result is published in reports. Prices depend on
it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ktray.accounting.provider import machine_type

# What a machine is, for its price: the provider's name of its type, as in prices.yaml; spot or on-demand; the name of
# its accelerators. They are set before `ray start`, where the provider's metadata service cannot be reached.
INSTANCE_VARIABLE, MARKET_VARIABLE, ACCELERATOR_VARIABLE = "KTRAY_INSTANCE", "KTRAY_MARKET", "KTRAY_ACCELERATOR"


def describe_device() -> dict[str, Any]:
    """Describe this machine, for prices and reports.

    Returns:
        ``cpu`` (model name), ``cores`` (usable, not installed), ``memory_bytes`` (usable), ``gpus`` (list of
        ``{"name", "memory_bytes"}`` of the GPUs that torch sees), ``system`` and, if the environment variables
        ``KTRAY_INSTANCE`` and ``KTRAY_MARKET`` are set, their values as ``instance`` and ``market``.
    """
    device: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": usable_cpus(),
        "memory_bytes": memory_bytes(),
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for name, variable in (("instance", INSTANCE_VARIABLE), ("market", MARKET_VARIABLE)):
        if os.environ.get(variable):
            device[name] = os.environ[variable]
    return device


def describe_node(gpus: float) -> dict[str, Any]:
    """`describe_device` for a node of a cluster, from a task that no GPU is assigned to.

    The type of the machine is that of the provider's metadata service if ``KTRAY_INSTANCE`` does not name it. The names
    of the GPUs are those of NVML, or ``KTRAY_ACCELERATOR``.

    Args:
        gpus: number of GPUs that Ray knows on the node.
    """
    device = describe_device()
    if "instance" not in device:
        device = {**machine_type(), **device}
    if gpus >= 1:
        name = os.environ.get(ACCELERATOR_VARIABLE)
        found = [{"name": name, "memory_bytes": 0}] * int(gpus) if name else _nvml_gpus()
        device["gpus"] = found[: int(gpus)] or device["gpus"]
    return device


def _nvml_gpus() -> list[dict[str, Any]]:
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [
            {"name": str(pynvml.nvmlDeviceGetName(h)), "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(h).total)}
            for h in handles
        ]
    except Exception:  # no driver, no NVML in the container
        return []


def device_name(description: Mapping[str, Any], gpu: bool) -> str:
    """The name of a device, by which speeds are compared: of the GPUs, or of the processor with its cores."""
    gpus = description.get("gpus") or []
    if gpu and gpus:
        return str(gpus[0]["name"])
    return f"{description['cpu']}, {description['cores']} cores"


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Model name of the processor; its architecture if the system does not report the name."""
    if sys.platform == "darwin":
        process = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return process.stdout.strip() or platform.machine()
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line]
    return names[0] if names else platform.machine()


def usable_cpus(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Number of cores that this process may use: its affinity mask, limited by the container's CPU quota; at least 1.

    `os.cpu_count` returns the host's cores; with that number, far too many threads would be started in a container.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    for folder in _cgroup_folders("cpu", cgroups, membership):
        quota, period = "max", "100000"
        if (text := _text(folder / "cpu.max")) is not None:
            quota, period = text.split()
        elif (text := _text(folder / "cpu.cfs_quota_us")) is not None:
            quota, period = text, _text(folder / "cpu.cfs_period_us") or period
        if quota != "max" and int(quota) > 0:
            cores = min(cores, max(1, int(quota) // int(period)))
    return max(1, cores)


def memory_bytes(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Memory that this process may use, in bytes: the machine's memory, limited by the container's limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in _cgroup_folders("memory", cgroups, membership):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes") or "max"
        if limit != "max":
            total = min(total, int(limit))
    return total


def peak_rss(status: Path = Path("/proc/self/status")) -> int:
    """Largest resident memory of this process so far, in bytes."""
    # On Linux, getrusage keeps the parent's peak across exec; VmHWM starts at zero.
    for line in (_text(status) or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_bytes": int(gpu.total_memory)} for gpu in gpus]


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _cgroup_folders(controller: str, cgroups: Path, membership: Path) -> list[Path]:
    """This process's control group for ``controller`` and all its parent groups (v1 and v2): each may set a limit."""
    folders: list[Path] = []
    for line in (_text(membership) or "").splitlines():
        _, names, inside = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        root = cgroups / controller if names else cgroups
        group = root / inside.lstrip("/")
        while group != root:
            folders.append(group)
            group = group.parent
        folders.append(root)
    return folders


PACKAGES = ("ray", "torch", "torchvision", "timm", "open_clip_torch", "mlflow", "pyarrow", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of Python, ktray and the libraries that influence a result, by name."""
    from ktray import __version__

    by_name = {"python": sys.version.split()[0], "platform": platform.platform(), "ktray": __version__}
    for name in PACKAGES:
        try:
            by_name[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return by_name


def waited_seconds() -> float:
    """How long the threads of this process have been ready to run without a core, in seconds; 0 if the system does not
    tell."""
    total = 0
    with contextlib.suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError, ValueError, IndexError):  # a thread may have ended since
                total += int(Path(f"/proc/self/task/{thread}/schedstat").read_text(encoding="ascii").split()[1])
    return total / 1e9
