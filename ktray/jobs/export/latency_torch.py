"""A student in PyTorch for `ktray.jobs.export.latency`. A separate module, since the process that measures onnxruntime
must not import PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ktray.jobs.export.runnable import Runnable
from ktray.tasks.students import load_student


def load(path: Path, threads: int) -> Runnable:
    """Load the student of a folder to run with ``threads`` threads."""
    torch.set_num_threads(threads)
    student = load_student(path)

    @torch.inference_mode()
    def run(x: np.ndarray) -> object:
        return student(torch.from_numpy(x))

    return Runnable(student.preprocess.size, run)
