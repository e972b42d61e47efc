"""Freed memory goes back to the system."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ktray.distributed import freed_memory
from ktray.distributed.connect import TUNED

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import re
from ktray.distributed.freed_memory import give_back

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) // 1000

pieces = [bytes(300_000) for _ in range(1000)]
full = resident()
del pieces[:-1]
kept = resident()
give_back(now=True)
print(full, kept, resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc gives memory back")
def test_a_worker_that_keeps_freed_memory_gives_it_back() -> None:
    environment = {**os.environ, **TUNED, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    full, kept, after = map(int, done.stdout.split())
    assert full - kept < 50, "without the call it stays with the process"
    assert kept - after > 200, "MB"


def test_it_is_called_once_in_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [1000.0], []
    monkeypatch.setattr(freed_memory.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: calls.append(name))
    monkeypatch.setattr(freed_memory, "_last", 0.0)
    for wait, expected in ((0, 1), (1, 1), (5, 2), (0, 2)):
        now[0] += wait
        freed_memory.give_back()
        assert len(calls) == expected
    freed_memory.give_back(now=True)
    assert len(calls) == 3
