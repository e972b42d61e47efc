"""No space left in the store: one clear line, whichever stage meets it. On a real, small file system."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_task import SMALL, write_gallery, write_task

ROOT = Path(__file__).resolve().parents[2]


def mounts() -> bool:
    """Whether a small tmpfs can be mounted in a namespace of its own."""
    if shutil.which("unshare") is None:
        return False
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}


@pytest.mark.slow
@pytest.mark.skipif(not mounts(), reason="needs unprivileged mounts (Linux)")
@pytest.mark.parametrize(("size", "where"), [("300k", "labels"), ("2500k", "teach")])
def test_a_full_disk_ends_with_one_line(tmp_path, size, where):
    write_task(tmp_path / "task")
    write_gallery(tmp_path / "gallery")
    disk = tmp_path / "disk"
    disk.mkdir()
    data = [f"task.data={tmp_path / 'task'}", f"gallery.data={tmp_path / 'gallery'}"]
    keys = [*SMALL, *data, "teach.views=8", "teach.mode=cached"]
    job = [sys.executable, str(ROOT / "jobs/distill.py"), f"store={disk}", *keys, "train.steps=5"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size={size} none "{disk}" && exec "$@"', "sh", *job],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 3, done.stdout[-2000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "No space is left" in errors[0]
    assert f"stages/{where}/" in errors[0]
    assert "store=" in errors[0]
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.skipif(not mounts(), reason="needs unprivileged mounts (Linux)")
def test_a_store_without_write_permission_ends_with_one_line(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    job = [sys.executable, str(ROOT / "jobs/distill.py"), f"store={disk / 'store'}"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o ro none "{disk}" && exec "$@"', "sh", *job],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 3
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: No permission to write")
    assert "store=" in error
