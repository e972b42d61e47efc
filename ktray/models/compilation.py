"""Whether ``torch.compile`` pays for a training on a GPU: arithmetic says whether to look, a measurement decides.

Compiling takes a minute or more and saves a part of each step. The decision is recorded and passed on, because compiled
kernels round in another way.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from ktray.models.messages import cause
from ktray.models.precision import Precision

logger = logging.getLogger("ktray")

Mode = Literal["default", "reduce-overhead"]  # the latter also puts the kernels into CUDA graphs
# Compiling FastViT-S12 took 70 s on an H200; a training that is compiled does it twice, once to measure. A step is
# hardly ever made faster by more than this share.
COMPILE_S, MOST_SAVED = 70.0, 0.3
_STEPS = 8  # of a measurement


@dataclass(frozen=True)
class Compilation:
    """How the student of a training is compiled.

    Attributes:
        mode: the mode of ``torch.compile``; None: not compiled.
        reason: the reason of the decision, one line for the log.
    """

    mode: Mode | None
    reason: str

    def apply(self, model: nn.Module) -> None:
        """Compile the model in place: the names in checkpoints stay the same."""
        if self.mode is not None:
            model.compile(mode=self.mode)

    @property
    def graphs(self) -> bool:
        """Whether the model's kernels are in CUDA graphs: the outputs of a step are overwritten by the next one."""
        return self.mode == "reduce-overhead"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Compilation:
        return cls(**value)


def may_pay(steps: int, seconds: float) -> bool:
    """Whether compiling, and the measurement of it, could take less time than it saves in a training of ``steps`` steps
    of ``seconds`` each."""
    return steps * seconds * MOST_SAVED > 2 * COMPILE_S


def choose_compilation(
    model: nn.Module,
    precision: Precision,
    device: torch.device,
    image_size: int | tuple[int, int],
    batch: int,
    steps: int,
    compile_in_place: Callable[[nn.Module], Any] = nn.Module.compile,
) -> Compilation:
    """Compile a copy of the model and time its steps, if `may_pay`. The training is compiled if its steps together save
    more time than it took to compile the copy.

    Args:
        model: takes normalised float images (N, 3, h, w); it is not changed.
        precision: the number format and layout of the training.
        image_size: image size of the training, in pixels.
        batch: images per step of this worker.
        steps: optimizer steps of the training.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        images = torch.rand(batch, 3, *size, device=device)
        return _measured(model, precision, images, steps, compile_in_place)


def _measured(
    model: nn.Module,
    precision: Precision,
    images: torch.Tensor,
    steps: int,
    compile_in_place: Callable[[nn.Module], Any],
) -> Compilation:
    device = images.device
    eager = _seconds(deepcopy(model).to(device), precision, images)
    if not may_pay(steps, eager):
        text = f"{steps:,} steps of {1000 * eager:.3g} ms are too few: compiling takes about {COMPILE_S:.0f} s"
        return Compilation(None, text)
    logger.info("compile   measuring whether torch.compile pays, which takes a minute or two")
    began = time.perf_counter()
    copy = deepcopy(model).to(device)
    try:
        compile_in_place(copy)
        compiled = _seconds(copy, precision, images)
    except Exception as error:  # compilers refuse models and machines in many ways, and eager steps always work
        return Compilation(None, f"torch.compile failed: {cause(getattr(error, 'inner_exception', error))}")
    finally:
        del copy
        torch.compiler.reset()
        gc.collect()  # a compiled model is part of cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
    spent = time.perf_counter() - began
    saved = steps * (eager - compiled)
    text = f"measured: eager {1000 * eager:.3g} ms, compiled {1000 * compiled:.3g} ms a step, compiling {spent:.0f} s"
    return Compilation("default" if saved > spent else None, text)


def _seconds(model: nn.Module, precision: Precision, images: torch.Tensor) -> float:
    """Mean time of a forward and a backward pass in seconds, after those in which kernels are made."""
    model.train().to(memory_format=precision.memory_format)
    images = images.to(memory_format=precision.memory_format)
    kind = images.device.type

    def step() -> None:
        with torch.autocast(kind, dtype=precision.autocast_dtype, enabled=precision.autocast_dtype is not None):
            out = model(images)
        model.zero_grad(set_to_none=True)
        (out[0] if isinstance(out, tuple) else out).float().square().mean().backward()

    def settled() -> float:
        if kind == "cuda":
            torch.cuda.synchronize(images.device)
        return time.perf_counter()

    for _ in range(3):
        step()
    began = settled()
    for _ in range(_STEPS):
        step()
    return (settled() - began) / _STEPS
