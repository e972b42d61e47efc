"""An open model for `ktray.jobs.export.latency`.

This module does not import PyTorch, because the process that measures onnxruntime must not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Runnable:
    """A model that can be run and timed.

    Attributes:
        size: (height, width) of the input.
        run: one inference of (N, 3, height, width); the result is ignored.
        dtype: dtype of the input: ``float32`` (normalised images) or ``uint8`` (pixels).
    """

    size: tuple[int, int]
    run: Callable[[np.ndarray], object]
    dtype: str = "float32"

    def example(self, count: int) -> np.ndarray:
        """Random images (count, 3, height, width) of `dtype`, always the same."""
        generator = np.random.default_rng(0)
        shape = (count, 3, *self.size)
        if self.dtype == "uint8":
            return generator.integers(0, 256, shape, dtype=np.uint8)
        return generator.standard_normal(shape, np.float32)
