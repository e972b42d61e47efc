"""A student in PyTorch for `ktray.jobs.export.latency`. A separate module, since the process that measures onnxruntime
must not import PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ktray.models.student.classifier_io import load_student

if TYPE_CHECKING:
    from ktray.jobs.export.images import Loaded


def load(path: Path, threads: int) -> Loaded:
    """Load the student of a folder to run with ``threads`` threads."""
    torch.set_num_threads(threads)
    student = load_student(path)

    @torch.inference_mode()
    def run(x: np.ndarray) -> object:
        return student(torch.from_numpy(x))

    return student.preprocess.size, run
