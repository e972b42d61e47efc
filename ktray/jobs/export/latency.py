"""How long a model takes for one image and for a batch, and the memory that it adds; each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import ktray
from ktray.accounting.device import peak_rss, usable_cpus
from ktray.errors import KtrayError
from ktray.jobs.export.images import Loaded

SECONDS = 1.5  # of measuring, for each row
LEAST, MOST = 10, 500  # inferences for each row


def measure(target: Path, batch: int, seconds: float = SECONDS) -> dict[str, Any]:
    """Measure a model in a new process.

    Args:
        target: an ONNX file, or a student's folder for PyTorch.
        batch: the larger batch; single images are measured too.

    Returns:
        ``rows``, each ``batch``, ``threads``, ``median_ms`` and ``p90_ms`` of an inference, and how many ``runs`` that
        is from; ``memory_bytes``: what loading and running it adds to the process, with the larger batch.

    Raises:
        KtrayError: the process failed.
    """
    # The package's parent stands on the path, wherever the job was started.
    root = str(Path(ktray.__file__).resolve().parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    environment = {**os.environ, "PYTHONPATH": path}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # they would cut the rows on all cores
        environment.pop(name, None)
    command = [sys.executable, "-m", __name__, str(target), str(batch), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        stderr_lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise KtrayError(
            f"The latency of '{target.name}' could not be measured: {stderr_lines[-1][:200]}", "Run it again."
        )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def timed(run: Callable[[], object], seconds: float) -> dict[str, Any]:
    """Median and 90th percentile of a call, in milliseconds, after a warm-up."""
    for _ in range(3):
        run()
    took: list[float] = []
    until = time.perf_counter() + seconds
    while len(took) < LEAST or (time.perf_counter() < until and len(took) < MOST):
        began = time.perf_counter()
        run()
        took.append(1e3 * (time.perf_counter() - began))
    return {
        "median_ms": float(np.median(took)),
        "p90_ms": float(np.percentile(took, 90)),
        "runs": len(took),
    }


def _main(target: Path, batch: int, seconds: float) -> None:
    # Libraries are in memory before it is looked at, so that the model alone is counted.
    if target.is_dir():
        from ktray.jobs.export.latency_torch import load
    else:
        from ktray.jobs.export.predict import Classifier

        def load(path: Path, threads: int) -> Loaded:
            model = Classifier(path, threads)
            height, width = model.preprocess["size"]
            return (height, width), lambda x: model.session.run(None, {model.input: x})

    before = _resident()
    rows: list[dict[str, Any]] = []
    memory = 0
    for threads in sorted({1, usable_cpus()}):
        size, run = load(target, threads)
        for n in (1, batch):
            x = np.random.default_rng(0).standard_normal((n, 3, *size), np.float32)
            run(x)
            if n == batch and not memory:
                memory = _resident() - before
            rows.append({"batch": n, "threads": threads, **timed(partial(run, x), seconds)})
    print(json.dumps({"rows": rows, "memory_bytes": memory}))


def _resident() -> int:
    """Bytes of this process that are in memory; the most so far where Linux's /proc is not."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_rss()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
