"""Machines as they are: addresses of Ray, temporary folders, shared memory, users without a home."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import OutOfMemoryError

from ktray.distributed import surroundings
from ktray.distributed.connect import _object_store
from ktray.distributed.explain import exit_code, explain
from ktray.errors import ResourceError


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("ray://head:10001", "Ray Client.*ray job submit"),
        ("http://head:8265", "dashboard.*ray job submit"),
        ("https://head", "dashboard"),
        ("grpc://head:1", "not an address of Ray.*HOST:PORT"),
        ("banana", "not an address of Ray.*HOST:PORT"),
        ("head:", "not an address of Ray.*HOST:PORT"),
    ],
)
def test_addresses_that_a_driver_cannot_join(address: str, remedy: str) -> None:
    with pytest.raises(ResourceError, match=remedy):
        surroundings.check_address(address)


def test_addresses_that_it_can_join() -> None:
    for address in (None, "", "auto", "local", "127.0.0.1:6379", "head.cluster:6379", "[::1]:6379"):
        surroundings.check_address(address)


def test_nothing_listens_at_an_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        surroundings.check_answers(address, within=0.0)
    with pytest.raises(ResourceError, match=rf"RAY_ADDRESS={address} cannot be joined.*refused.*`ray status`"):
        surroundings.check_answers(address, within=0.0)


def test_a_cluster_that_is_gone() -> None:
    assert "ray start --head" in str(surroundings.not_reached("auto", ConnectionError("no Ray")))
    text = str(surroundings.not_reached("10.0.0.1:6379", ConnectionError("timed\nout")))
    assert "10.0.0.1:6379 cannot be joined: timed out" in text
    assert "Unset RAY_ADDRESS" in text


@pytest.mark.parametrize(
    ("environment", "moved"),
    [
        ({"TMPDIR": "/tmp"}, False),
        ({"TMPDIR": "/tmp/" + "x" * 60}, True),
        ({"TMPDIR": "/var/spool/slurm/job1234567/tmp"}, False),
        ({"TMPDIR": "/tmp/" + "x" * 60, "RAY_TMPDIR": "/tmp/r"}, False),
        ({"RAY_TMPDIR": "/tmp/" + "ü" * 30}, True),
    ],
)
def test_a_temporary_folder_that_is_too_long_for_sockets(environment: dict[str, str], moved: bool) -> None:
    asked = dict(environment)
    told = surroundings.use_short_temporary_folder(asked)
    assert bool(told) == moved
    assert (asked.get("RAY_TMPDIR") == "/tmp") == moved
    folder = asked.get("RAY_TMPDIR") or asked["TMPDIR"]
    socket = f"{folder}/ray/session_2026-11-28_14-30-00_123456_1234567/sockets/plasma_store"
    assert len(os.fsencode(socket)) <= 107


def test_little_shared_memory_and_little_memory_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=64 << 8, f_frsize=4096))
    (told,) = surroundings.shared_memory(2e9, 16e9)
    assert "67 MB" in told
    assert "--shm-size=2g" in told
    assert any("0.5 GB of memory" in line for line in surroundings.shared_memory(8e7, 0.5e9))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1 << 20, f_frsize=4096))
    assert surroundings.shared_memory(2e9, 16e9) == []


@pytest.mark.parametrize("memory", [0.2e9, 0.5e9, 1e9, 3e9, 24e9])
def test_the_object_store_has_a_size_that_ray_accepts(memory: float) -> None:
    from ray._private import ray_constants

    assert ray_constants.OBJECT_STORE_MINIMUM_MEMORY_BYTES <= _object_store(memory) <= 2e9


@pytest.mark.parametrize("homeless", ["no entry", "/", "a folder of somebody else"])
def test_a_user_without_a_name_and_a_home(homeless: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Containers often run under a user id that has no entry in /etc/passwd."""

    def home() -> Path:
        if homeless == "no entry":
            raise RuntimeError("Could not determine home directory.")
        return Path(homeless if homeless == "/" else "/proc/elsewhere")

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    environment: dict[str, str] = {}
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    told = surroundings.give_a_home(environment)
    assert "no home folder" in told
    assert os.access(environment["HOME"], os.W_OK)
    assert Path(environment["HOME"]).stat().st_mode & 0o077 == 0
    assert environment["USER"]


def test_a_user_with_a_home_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    environment: dict[str, str] = {}
    assert surroundings.give_a_home(environment) == ""
    assert environment["HOME"] == str(tmp_path)


def test_a_task_without_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "1 worker(s) were killed. Memory on the node (IP: 10.0.0.1) was 9.4GB used / 10.0GB limit (0.94)"
    error = RuntimeError("a stage failed")
    error.__cause__ = OutOfMemoryError(text)
    assert exit_code(error) == 3
    assert "A task ran out of memory in every attempt (9.4GB used / 10.0GB on its machine)" in explain(error)


def test_the_memory_of_a_gpu_is_not_that_of_the_machine() -> None:
    error = RuntimeError("a stage failed")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "CUDA out of memory" in explain(error)
    assert "ran out of memory in" not in explain(error)
    assert exit_code(error) == 3


_GREEDY = """
import os, sys, time
os.environ["RAY_memory_usage_threshold"] = "0.001"  # whatever runs is too much
os.environ["RAY_memory_monitor_refresh_ms"] = "100"
os.environ["RAY_task_oom_retries"] = "1"
from ktray.distributed.connect import connect
from ktray.distributed.explain import exit_code, explain
connect()
import ray.data
def slow(block):
    time.sleep(2)
    return block
try:
    ray.data.range(4, override_num_blocks=1).map_batches(slow).take_all()
except Exception as error:
    print(explain(error))
    sys.exit(exit_code(error))
"""


@pytest.mark.long
def test_a_task_that_never_has_enough_memory_ends() -> None:
    ended = subprocess.run([sys.executable, "-c", _GREEDY], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 3, ended.stderr
    assert "ran out of memory" in ended.stdout
