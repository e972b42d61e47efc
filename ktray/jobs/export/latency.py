"""The time of a model for one image and for a batch, and its memory; each model is measured in a new process."""

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
from ktray.jobs.export.runnable import Runnable

SECONDS = 1.5  # time of the measurement of each row
LEAST, MOST = 10, 500  # smallest and largest number of inferences for each row


def measure(target: Path, batch: int, seconds: float = SECONDS, *, name: str = "") -> dict[str, Any]:
    """Measure a model in a new process.

    Args:
        target: an ONNX file, or a student's folder for PyTorch.
        batch: the batch size; single images are measured in addition.
        seconds: time of the measurement of each row.
        name: name of the export target that opens the file; empty: the file is ONNX, or the target is a folder.

    Returns:
        ``rows``, each with ``batch``, ``threads``, ``median_ms`` and ``p90_ms`` of an inference, and the number of
        ``runs``; ``memory_bytes``, the memory that loading the model and running a batch add to the process.

    Raises:
        KtrayError: the process failed.
    """
    # The process must find the package from any working folder.
    root = str(Path(ktray.__file__).resolve().parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    environment = {**os.environ, "PYTHONPATH": path}
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # they would limit the rows that use all cores
        environment.pop(variable, None)
    command = [sys.executable, "-m", __name__, str(target), str(batch), str(seconds), name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        stderr_lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise KtrayError(
            f"The latency of '{target.name}' could not be measured: {stderr_lines[-1][:200]}", "Run the export again."
        )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def timed(run: Callable[[], object], seconds: float) -> dict[str, Any]:
    """Measure median and 90th percentile of a call, in milliseconds, after a warm-up."""
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


def _main(target: Path, batch: int, seconds: float, name: str) -> None:
    # The libraries are loaded before the first look at the memory, so that only the model is counted.
    load = _loader(target, name)
    before = _resident()
    rows: list[dict[str, Any]] = []
    memory = 0
    for threads in sorted({1, usable_cpus()}):
        model = load(target, threads)
        for n in (1, batch):
            x = model.example(n)
            model.run(x)
            if n == batch and not memory:
                memory = _resident() - before
            rows.append({"batch": n, "threads": threads, **timed(partial(model.run, x), seconds)})
    print(json.dumps({"rows": rows, "memory_bytes": memory}))


def _loader(target: Path, name: str) -> Callable[[Path, int], Runnable]:
    """Return the function that opens a model with a number of threads; its libraries are loaded."""
    if name:
        from ktray.recipe.registries import EXPORTS

        loader: Callable[[Path, int], Runnable] = EXPORTS.get(name).loader()
        return loader
    if target.is_dir():
        from ktray.jobs.export.latency_torch import load

        return load
    from ktray.jobs.export.predict import Classifier

    def load_onnx(path: Path, threads: int) -> Runnable:
        model = Classifier(path, threads)
        height, width = model.preprocess["size"]
        return Runnable((height, width), lambda x: model.session.run(None, {model.input: x}))

    return load_onnx


def _resident() -> int:
    """Return the resident bytes of this process; without Linux's /proc, their largest value so far."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_rss()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
