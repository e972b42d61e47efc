"""What the machine is: limits read from control groups that the test writes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ktray.accounting import device


def groups(tmp_path: Path, membership: str, files: dict[str, str]) -> dict[str, Path]:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "self").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return {"cgroups": tmp_path / "cgroup", "membership": tmp_path / "self"}


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/job/task\n", {"job/cpu.max": "400000 100000", "job/task/cpu.max": "max 100000"}, 4),
        ("3:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_cores_are_cut_by_affinity_and_quota(
    tmp_path: Path, membership: str, files: dict[str, str], cores: int
) -> None:
    assert device.usable_cpus(**groups(tmp_path, membership, files)) == cores


def test_memory_is_cut_by_the_tightest_limit(tmp_path: Path) -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    files = {"memory.max": "max", "job/memory.max": "200000000", "job/task/memory.max": "300000000"}
    assert device.memory_bytes(**groups(tmp_path, "0::/job/task\n", files)) == 200_000_000
    assert (
        device.memory_bytes(**groups(tmp_path / "v1", "4:memory:/\n", {"memory/memory.limit_in_bytes": str(2**62)}))
        == machine
    )


def test_peak_memory_grows_with_what_is_held(tmp_path: Path) -> None:
    # In a process of its own: this one's peak may stand far above what a test should allocate.
    code = (
        "from ktray.accounting.device import peak_rss\nbefore = peak_rss()\n"
        "block = b'x' * 200_000_000\nafter = peak_rss()\ndel block\n"
        "assert 190_000_000 < after - before < 260_000_000, (before, after)\nassert peak_rss() - before > 190_000_000"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(device.__file__).parents[2])
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t    2048 kB\n")
    assert device.peak_rss(tmp_path / "status") == 2048 * 1024


def test_the_description_holds_what_prices_need_and_no_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTRAY_INSTANCE", "c7i.xlarge")
    found = device.describe_device()
    assert found["cores"] == device.usable_cpus() >= 1
    assert found["memory_bytes"] == device.memory_bytes()
    assert found["cpu"]
    assert found["instance"] == "c7i.xlarge"
    assert isinstance(found["gpus"], list)
    assert socket.gethostname() not in str(found)
