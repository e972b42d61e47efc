"""The machine of a run: its hardware, the part of it that this process may use, and the memory that was used.

`describe_device` returns no host names and no addresses, because its result is published in reports. Prices depend on
it.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# The provider's name of the machine's type, as in prices.yaml. Cluster templates set it when they start a machine.
INSTANCE_VARIABLE = "KTRAY_INSTANCE"


def describe_device() -> dict[str, Any]:
    """Describe this machine, for prices and reports.

    Returns:
        ``cpu`` (model name), ``cores`` (usable, not installed), ``memory_bytes`` (usable), ``gpus`` (list of
        ``{"name", "memory_bytes"}`` of the GPUs that torch sees), ``system`` and, if the environment variable
        ``KTRAY_INSTANCE`` is set, its value as ``instance``.
    """
    device: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": usable_cpus(),
        "memory_bytes": memory_bytes(),
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if os.environ.get(INSTANCE_VARIABLE):
        device["instance"] = os.environ[INSTANCE_VARIABLE]
    return device


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
